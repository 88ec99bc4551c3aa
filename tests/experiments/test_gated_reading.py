"""A gate that is always, never or for some rows open, against readers that learn and that do not."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.context_use import by_place
from experiments.gated_reading import above, always, budget, first, gated_reader, surprising
from experiments.streaming import reader
from hope_jax.models import ModelConfig, build_lm
from hope_jax.training.errors import UserError

PLAIN = ModelConfig(name="hope_attention", vocab_size=128, dim=8, heads=1, layers=1, cms_hidden=(8, 8), max_length=24)
LEARNING = dataclasses.replace(PLAIN, cms_chunks=(4,), cms_eta=2.0)
TEXT = np.random.default_rng(0).integers(97, 123, size=(2, 21)).astype(np.uint8)


def test_gates_lie_between_learning_and_not_learning():
    """20 bytes are 5 chunks of 4; the last is never written."""
    params = jax.jit(build_lm(PLAIN).init)(jax.random.key(0))
    read = gated_reader(LEARNING)

    def rows(config):
        pieces = reader(config, least=4)
        return [by_place(pieces, params, TEXT[[row, row]]) for row in (0, 1)]

    learning, frozen = rows(LEARNING), rows(PLAIN)
    assert all(np.abs(a - b)[4:].max() > 1e-3 for a, b in zip(learning, frozen, strict=True))
    never, some = (lambda bits_NB: np.array([False, False])), (lambda bits_NB: np.array([True, False]))
    cases = ((always, learning, 1.0), (never, frozen, 0.0), (some, [learning[0], frozen[1]], 0.5))
    for gate, expected, written in cases:
        found = read(params, TEXT, gate)
        np.testing.assert_allclose(found.bits_T, np.mean(expected, axis=0), rtol=1e-5)
        assert found.written == written
    seen = []

    def second_only(bits_NB):
        seen.append(bits_NB)
        return np.full(2, len(bits_NB) == 2)

    found = read(params, TEXT, second_only)
    np.testing.assert_allclose(found.bits_T[:8], np.mean(frozen, axis=0)[:8], rtol=1e-5)
    assert np.abs(found.bits_T - np.mean(frozen, axis=0))[8:].max() > 1e-3 and found.written == 0.25
    # What a gate is shown are the chunks so far.
    assert [len(bits) for bits in seen] == [1, 2, 3, 4]
    np.testing.assert_allclose(seen[-1].mean(axis=1), found.bits_T[:16].reshape(4, 4).mean(axis=1), rtol=1e-5)


def test_gates_open_where_they_say():
    bits = np.array([[4.0, 4.0], [2.0, 6.0], [3.5, 5.0]])
    opened = {
        "first 2": ([first(2)(bits[:n]) for n in (1, 2, 3)], [[1, 1], [1, 1], [0, 0]]),
        "above": ([above(3.9)(bits[:n]) for n in (1, 2, 3)], [[1, 1], [0, 1], [0, 1]]),
        # Means before: none; 4, 4; 3, 5.
        "surprising": ([surprising(0.5)(bits[:n]) for n in (1, 2, 3)], [[1, 1], [0, 1], [1, 0]]),
        "budget": ([budget(0.5)(bits[:n]) for n in (1, 2, 3)], [[1, 1], [0, 1], [1, 1]]),
    }
    for name, (found, expected) in opened.items():
        assert np.array(found).tolist() == np.array(expected, bool).tolist(), name


def test_one_fast_level_is_asked_for():
    with pytest.raises(UserError, match=r"one fast level; this model has the chunks \(\)"):
        gated_reader(PLAIN)
