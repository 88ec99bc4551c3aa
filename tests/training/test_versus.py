"""A comparison is fair: as many parameters, the same batches."""

import dataclasses

import jax
import numpy as np
import pytest

from hope_jax.models import ModelConfig, count_parameters
from hope_jax.training.command import run_training
from hope_jax.training.config import TrainConfig
from hope_jax.training.corpus import Corpus
from hope_jax.training.data import training_batches
from hope_jax.training.errors import RunFailed, UserError
from hope_jax.training.mixture import Mixture
from hope_jax.training.versus import comparable, opponent
from hope_jax.training.vocabulary import load_vocabulary


def test_opponent_has_as_many_parameters(small):
    ours = dataclasses.replace(
        small,
        model=dataclasses.replace(small.model, name="hope_attention", cms_hidden=(40, 40), remat="full"),
        cms_periods=(1, 2),
    )
    theirs = opponent(ours, "transformer")
    assert theirs.model.name == "transformer" and theirs.cms_periods == ()
    assert theirs.model.remat == "none"
    assert count_parameters(theirs.model) == pytest.approx(count_parameters(ours.model), rel=0.01)
    assert dataclasses.replace(theirs, model=ours.model, cms_periods=(1, 2)) == ours
    deep = dataclasses.replace(small, model=dataclasses.replace(small.model, name="transformer", layers=3))
    with pytest.raises(UserError, match="samba alternates 2 mixers"):
        opponent(deep, "samba")
    fast = dataclasses.replace(ours, model=dataclasses.replace(ours.model, cms_chunks=(4,)))
    assert opponent(fast, "hope").model.cms_chunks == (4,)  # levels that adapt, against levels that adapt
    assert opponent(fast, "delta_net").model.cms_chunks == ()
    with pytest.raises(UserError, match="choose one with model=NAME"):
        opponent(small, small.model.name)
    long = TrainConfig(model=dataclasses.replace(small.model, name="delta_net", max_length=64), seq_len=128)
    assert opponent(long, "transformer").model.max_length == 128  # its attention reads what ours reads
    free = TrainConfig(model=ATTENTION, documents="reset", document_multiple=1, seq_len=96)
    assert opponent(free, "hope").document_multiple == 16


SMALL = ModelConfig(dim=16, layers=1, heads=2, memory_hidden=8, cms_hidden=(16, 16))
FAST = dataclasses.replace(SMALL, cms_chunks=(24,), chunk_proj=8, chunk_mem=8)
ATTENTION = dataclasses.replace(SMALL, name="transformer", max_length=96)


@pytest.mark.parametrize(
    ("model", "other", "documents", "multiple"),
    [
        (ATTENTION, "hope", "reset", 16),
        (SMALL, "transformer", "reset", 16),
        (FAST, "delta_net", "carry_reset", 48),
        (dataclasses.replace(ATTENTION, chunk_proj=12, chunk_mem=12), "delta_net", "reset", 24),
        (SMALL, "transformer", "ignore", None),
        (SMALL, "delta_net", "carry", None),
    ],
)
def test_both_read_the_same_batches(model, other, documents, multiple):
    ours = comparable(TrainConfig(model=model, documents=documents, seq_len=96, batch_size=4), other)
    theirs = opponent(ours, other)
    assert multiple is None or ours.segment == theirs.segment == multiple
    starts = np.cumsum([0, 5, 40, 33, 90, 200, 17])
    corpus = Corpus("text", np.arange(600, dtype=np.uint32), np.zeros(0), starts, starts[:0], {})
    mixture = Mixture((corpus,), (1.0,), load_vocabulary("bytes"))
    for step in range(3):
        jax.tree.map(np.testing.assert_array_equal, *(training_batches(mixture, c)[step] for c in (ours, theirs)))


def test_what_is_compared_is_what_is_trained(tmp_path, monkeypatch):
    """The run itself begins its documents where the other model can; a run that can already is left as it was."""
    trained = []

    def train(config, *_, **__):
        trained.append(config)
        raise RunFailed("enough")

    monkeypatch.setattr("hope_jax.training.command.train", train)
    for model, versus in ((ATTENTION, "hope"), (SMALL, "transformer")):
        config = TrainConfig(model=model, documents="reset", seq_len=96)
        with pytest.raises(RunFailed, match="enough"):
            run_training(config, tmp_path, versus=versus)
    assert [config.document_multiple for config in trained] == [16, 0]
    with pytest.raises(UserError, match=r"seq_len=72: with documents=reset .* multiple of 16 tokens"):
        run_training(TrainConfig(model=ATTENTION, documents="reset", seq_len=72), tmp_path, versus="hope")
