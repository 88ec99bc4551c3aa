"""A gate that is open for some rows or chunks, against readers that learn and that do not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.context_use import by_place
from experiments.gated_reading import first, gated_reader
from experiments.streaming import reader
from hope_jax import online
from hope_jax.models import ModelConfig, build_lm
from hope_jax.training.errors import UserError

PLAIN = ModelConfig(name="hope_attention", vocab_size=128, dim=8, heads=1, layers=1, cms_hidden=(8, 8), max_length=24)
LEARNING = dataclasses.replace(PLAIN, cms_chunks=(4,), cms_eta=2.0)
TEXT = np.random.default_rng(0).integers(97, 123, size=(2, 21)).astype(np.uint8)


def test_gates_lie_between_learning_and_not_learning():
    """20 bytes are 5 chunks of 4; after the last nothing is read that would tell whether it was written."""
    params = jax.jit(build_lm(PLAIN).init)(jax.random.key(0))
    read = gated_reader(LEARNING)

    def rows(config):
        pieces = reader(config, least=4)
        return [by_place(pieces, params, TEXT[[row, row]]) for row in (0, 1)]

    learning, frozen = rows(LEARNING), rows(PLAIN)
    assert all(np.abs(a - b)[4:].max() > 1e-3 for a, b in zip(learning, frozen, strict=True))
    # After the first chunk no row has learned: a bar between their surprises opens the gate of one row alone, for good.
    surprises = [float(row[:4].mean() * np.log(2)) for row in frozen]
    bar, which = np.mean(surprises), int(np.argmax(surprises))

    def update(state, surprise):
        opened = jnp.where(state[0] == 0, surprise > bar, state[1])
        return (state[0] + 1, opened), opened

    one_row = online.Gate("one row", lambda: (jnp.int32(0), jnp.bool(False)), update)
    some = [(learning if row == which else frozen)[row] for row in (0, 1)]
    found = read(params, TEXT, one_row)
    np.testing.assert_allclose(found.bits_T, np.mean(some, axis=0), rtol=1e-5)
    assert found.written == 0.5
    second_only = online.Gate("second", lambda: jnp.int32(0), lambda n, surprise: (n + 1, n == 1))
    found = read(params, TEXT, second_only)
    np.testing.assert_allclose(found.bits_T[:8], np.mean(frozen, axis=0)[:8], rtol=1e-5)
    assert np.abs(found.bits_T - np.mean(frozen, axis=0))[8:].max() > 1e-3 and found.written == 0.25


def test_the_first_chunks_are_written():
    gate, opened = first(2), []
    state = gate.init()
    for surprise in (1.0, 0.0, 9.0):
        state, write = gate.update(state, jnp.float32(surprise))
        opened.append(bool(write))
    assert opened == [True, True, False]


def test_one_fast_level_is_asked_for():
    with pytest.raises(UserError, match=r"one fast level; this model has the chunks \(\)"):
        gated_reader(PLAIN)
