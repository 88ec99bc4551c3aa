"""Associative recall against a dictionary that replays each sequence."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.mqar import POWER, TINY, RecallOptions, hits, sequences, stream
from experiments.options import cells
from experiments.training import Batch
from hope_jax.training.errors import UserError

SIZES = {"pairs": 5, "vocab": 40, "length": 64}


def test_queries_ask_for_what_a_dictionary_remembers():
    batch = sequences(np.random.default_rng(0), 50, **SIZES)
    for tokens, targets, weights in zip(*batch, strict=True):
        memory = dict(zip(tokens[0:10:2].tolist(), tokens[1:10:2].tolist(), strict=True))
        assert len(memory) == 5 and set(memory) <= set(range(1, 20)) and set(memory.values()) <= set(range(20, 40))
        assert len(set(memory.values())) == 5
        asked = [t for t in range(10, 64) if tokens[t] != 0]
        assert np.flatnonzero(weights).tolist() == asked
        assert [memory[tokens[t]] for t in asked] == targets[asked].tolist()
        assert sorted(tokens[asked].tolist()) == sorted(memory)
        assert (weights[asked] == 1).all()


def test_gaps_follow_the_power_law():
    """The nearest place is the likeliest; with one pair its share is that of the law, within 5 standard errors."""
    rows = 4000
    batch = sequences(np.random.default_rng(1), rows, pairs=1, vocab=40, length=64)
    place = batch.weights.argmax(axis=1)
    law = np.arange(1, 32) ** (POWER - 1)
    law /= law.sum()
    counts = np.bincount((place - 2) // 2, minlength=31)
    assert (place % 2 == 0).all()
    np.testing.assert_array_less(np.abs(counts / rows - law), 5 * np.sqrt(law * (1 - law) / rows) + 1e-12)


def test_streams_follow_the_seed_and_do_not_repeat():
    [cell] = cells(TINY)
    first, again, other = (stream(dataclasses.replace(cell, seeds=(seed,))) for seed in (0, 0, 1))
    batches = [next(first) for _ in range(5)]
    assert all((batch.tokens == next(again).tokens).all() for batch in batches)
    assert len({batch.tokens.tobytes() for batch in [*batches, next(other)]}) == 6


def test_accuracy_is_over_queries_alone():
    batch = Batch(np.zeros((1, 4), np.int32), np.array([[2, 1, 2, 0]]), np.array([[0, 1, 1, 0]], np.float32))
    logits = np.eye(3)[[[0, 1, 0, 0]]]  # wrong without weight, right, wrong, right without weight
    np.testing.assert_array_equal(hits(jnp.asarray(logits), batch), [1, 2])


@pytest.mark.parametrize("wrong", [{"pairs": (40,)}, {"pairs": (4, 20), "vocab": 40}])
def test_too_many_pairs_are_refused(wrong):
    with pytest.raises(UserError, match="pairs need a length of"):
        RecallOptions(**wrong)
