"""Options that no experiment can run with are refused where they are given; the shortest sequences allowed exist."""

import numpy as np
import pytest

from experiments.formal_languages import LanguageOptions
from experiments.mad import MadOptions, difficulty, examples
from experiments.mqar import RecallOptions
from hope_jax.training.errors import UserError


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (LanguageOptions, {"languages": ("parit",)}, "unknown language 'parit'; did you mean 'parity'"),
        (LanguageOptions, {"test_strings": 0}, "test_strings must be at least 1; got 0"),
        (MadOptions, {"test_examples": 0}, "test_examples must be at least 1; got 0"),
        (MadOptions, {"difficulties": ("selective_copying:length=16",)}, "needs length=33 or more; got 16"),
        (MadOptions, {"difficulties": ("fuzzy_recall:length=8",)}, "needs length=12 or more; got 8"),
        (RecallOptions, {"test_sequences": 0}, "test_sequences must be at least 1; got 0"),
    ],
)
def test_what_cannot_be(options, changes, message):
    with pytest.raises(UserError, match=message):
        options(**changes)


@pytest.mark.parametrize("setting", ["selective_copying:length=33", "fuzzy_recall:length=12", "compression:length=1"])
def test_the_shortest_sequences_can_be_made(setting):
    level = difficulty(setting)
    batch = examples(setting.partition(":")[0], level, np.random.default_rng(0), 200, training=True)
    assert batch.tokens.shape == (200, level.length)
    assert (batch.weights.sum(axis=1) > 0).all()
