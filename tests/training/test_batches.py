"""Batches of documents, mixtures and lanes: every target once per epoch, whoever reads and wherever it starts."""

import dataclasses
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest

from hope_jax.models import ModelConfig
from hope_jax.training.config import TrainConfig
from hope_jax.training.corpus import Corpus
from hope_jax.training.data import _apportion, document_eval_batches, feed, training_batches
from hope_jax.training.errors import UserError
from hope_jax.training.mixture import Mixture
from hope_jax.training.packing import Batch, efficiency, pack
from hope_jax.training.vocabulary import load_vocabulary

LENGTH, MULTIPLE, ROWS = 32, 16, 4
KINDS = ("ignore", "reset", "carry", "carry_reset")


def text(sizes, first=1):
    """Tokens that are their own place, from `first` on, so that a token id names the target."""
    starts = np.cumsum([0, *sizes[:-1]], dtype=np.int64)
    return np.arange(first, first + sum(sizes), dtype=np.uint32), starts


SIZES = [1, 3, 90, 17, 2, 33, 64, 5, 5, 40, 31, 32, 16, 8, 7, 250, 12]
TOKENS, STARTS = text(SIZES)


def corpus(tokens=TOKENS, starts=STARTS):
    facts = {"train": {"bytes": tokens.size}}
    return Corpus("text", tokens, tokens[:0], starts, starts[:0], facts)


def batches(documents, corpora=None, shares=(1.0,), rows=ROWS, seed=0) -> Any:
    model = ModelConfig(name="delta_net", dim=16, heads=2, layers=1)
    config = TrainConfig(model=model, documents=documents, seq_len=LENGTH, batch_size=rows, seed=seed)
    assert config.segment == MULTIPLE
    return training_batches(Mixture(tuple(corpora or [corpus()]), shares, load_vocabulary("bytes")), config)


def targets(batch):
    """Ids of the targets that count, row after row."""
    if isinstance(batch, Batch):
        return batch.targets[batch.weights > 0].tolist()
    return batch[:, 1:].ravel().tolist()


def epoch_steps(made):
    """Steps in which an epoch of one text ends."""
    return made.lanes[0].steps if hasattr(made, "lanes") else -(-made.windows // ROWS)


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("documents", KINDS)
def test_an_epoch_has_every_target_once(documents, epoch):
    made = batches(documents)
    if documents in ("ignore", "reset"):  # the last batch of an epoch goes on with the next
        parts = [made.row(item) for item in range(epoch * made.windows, (epoch + 1) * made.windows)]
    if documents == "ignore":
        seen = Counter(int(token) for part in parts for token in part[1:])
        assert set(seen.values()) == {1} and len(seen) > TOKENS.size - 2 * LENGTH
        return
    if documents == "reset":
        seen = Counter(int(token) for part in parts for token in part.targets[part.weights > 0])
    else:
        steps = range(epoch * epoch_steps(made), (epoch + 1) * epoch_steps(made))
        seen = Counter(token for step in steps for token in targets(made[step]))
    expected = set(TOKENS.tolist())
    if documents == "carry":
        missing = expected - set(seen)
        assert len(missing) == 1 and missing <= set(TOKENS[STARTS].tolist())  # of the document that comes first
    else:
        assert set(seen) == expected - set(TOKENS[STARTS].tolist())
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("documents", ["reset", "carry_reset"])
def test_inputs_stand_before_their_targets_and_documents_begin_with_a_flag(documents):
    made = batches(documents)
    for step in range(40):
        batch = made[step]
        real = batch.weights > 0
        np.testing.assert_array_equal(batch.tokens[real] + 1, batch.targets[real])
        first = np.isin(batch.tokens, TOKENS[STARTS]) & real
        rows, places = np.nonzero(first)
        assert (places % MULTIPLE == 0).all() and batch.starts[rows, places // MULTIPLE].all()
        # Without a flag a segment goes on where the one before it stopped.
        on = ~batch.starts[:, 1:] & real[:, MULTIPLE::MULTIPLE]
        before = batch.tokens[:, MULTIPLE - 1 : -1 : MULTIPLE]
        np.testing.assert_array_equal(before[on] + 1, batch.tokens[:, MULTIPLE::MULTIPLE][on])


@pytest.mark.parametrize("documents", ["carry", "carry_reset"])
def test_a_lane_goes_on_from_step_to_step(documents):
    made = batches(documents)
    steps = epoch_steps(made)
    assert steps > 3
    whole = [made[step] for step in range(steps)]
    for before, after in itertools.pairwise(whole):
        on = (before.weights[:, -1] > 0) & (after.weights[:, 0] > 0) & ~after.starts[:, 0]
        np.testing.assert_array_equal(before.targets[on, -1], after.tokens[on, 0])
        assert documents == "carry_reset" or on[:-1].all()
    flags = np.concatenate([batch.starts for batch in whole])
    assert flags[:ROWS, 0].all() and flags[ROWS:].any() == (documents == "carry_reset")


def test_only_long_documents_are_cut_and_windows_are_full():
    rng = np.random.default_rng(0)
    tokens, starts = text(rng.integers(2, 400, 500).tolist())
    pieces = pack(starts, tokens.size, length=256, multiple=16)
    inputs = np.diff(starts, append=tokens.size) - 1
    assert pieces.count.size == (-(-inputs // 256)).sum()
    assert efficiency(pieces, 256) > 0.9 and pieces.count.sum() == inputs.sum()
    assert efficiency(pack(starts, tokens.size, length=256, multiple=1), 256) > 0.99


@pytest.mark.parametrize("documents", KINDS)
@pytest.mark.parametrize("mixed", [False, True], ids=["one", "mixed"])
def test_hosts_read_their_rows_and_a_resume_on_other_hosts_neither_repeats_nor_skips(documents, mixed):
    """Twelve steps on one host; five on four hosts, then seven on two."""
    other = corpus(*text([50] * 9, first=2_000))
    made = (lambda: batches(documents, [corpus(), other], (0.7, 0.3))) if mixed else (lambda: batches(documents))
    alone = [targets(batch) for batch in feed(made(), 0, 12)]

    def on(hosts, start, stop):
        share = ROWS // hosts
        feeds = [feed(made(), start, stop, range(p * share, (p + 1) * share)) for p in range(hosts)]
        return [[*itertools.chain(*map(targets, parts))] for parts in zip(*feeds, strict=True)]

    assert on(4, 0, 5) + on(2, 5, 12) == alone
    assert [step for step in range(12) if on(1, step, step + 1) != alone[step : step + 1]] == []


def test_from_the_disk_batches_are_read_ahead_in_order(tmp_path):
    TOKENS.tofile(tmp_path / "train.bin")
    mapped = corpus(np.memmap(tmp_path / "train.bin", np.uint32, "r"))
    for documents in KINDS:
        made, memory = batches(documents, [mapped]), batches(documents)
        assert made.on_disk and not memory.on_disk
        found = [targets(batch) for batch in feed(made, 3, 30)]
        assert found == [targets(memory[step]) for step in range(3, 30)]


def test_mixture_weights():
    other = corpus(*text([50] * 40, first=2_000))
    for documents in KINDS:
        made = batches(documents, [corpus(), other], (0.75, 0.25))
        rows = [row for step in range(10) for row in (made[step] if documents == "ignore" else made[step].tokens)]
        assert np.mean([row.max() >= 2_000 for row in rows]) == 0.25
    with pytest.raises(UserError, match="batch_size=1 rows cannot carry 2 sources"):
        batches("carry", [corpus(), other], (0.5, 0.5), rows=1)


def test_seed_changes_the_order():
    for documents in KINDS:
        assert targets(batches(documents)[0]) != targets(batches(documents, seed=1)[0])


def test_evaluation_of_documents_counts_every_target_once():
    made = document_eval_batches(TOKENS, STARTS, batch=3, length=LENGTH, multiple=MULTIPLE)
    seen = Counter(token for batch in made for token in targets(batch.tokens))
    assert set(seen) == set(TOKENS.tolist()) - set(TOKENS[STARTS].tolist()) and set(seen.values()) == {1}
    limited = list(document_eval_batches(TOKENS, STARTS, batch=3, length=LENGTH, multiple=MULTIPLE, limit=2))
    assert len(limited) == 2


def test_configs_that_do_not_fit():
    attention = TrainConfig(model=ModelConfig(name="transformer"))
    with pytest.raises(UserError, match=r"documents=carry: the attention cache .* give documents=reset"):
        dataclasses.replace(attention, documents="carry")
    assert dataclasses.replace(attention, documents="reset", seq_len=33).segment == 1
    with pytest.raises(UserError, match=r"seq_len=40: with documents=reset .* multiple of 16 tokens"):
        TrainConfig(seq_len=40, documents="reset")
    with pytest.raises(UserError, match="document_multiple=24 must be a multiple of 16"):
        TrainConfig(seq_len=48, documents="reset", document_multiple=24)
    with pytest.raises(UserError, match=r"no document .* two tokens"):
        batches("reset", [corpus(*text([1, 1]))])


@pytest.mark.parametrize(
    ("shares", "rows", "counts"),
    [([0.9, 0.1], 10, [9, 1]), ([0.7, 0.3], 4, [3, 1]), ([0.99, 0.01], 4, [3, 1]), ([1, 1, 1], 5, [2, 2, 1])],
)
def test_rows_are_shared_out_by_weight_and_nobody_goes_without(shares, rows, counts):
    assert _apportion(shares, rows) == counts


def test_too_few_rows_for_the_sources():
    with pytest.raises(UserError, match="batch_size=1 rows cannot carry 2 sources"):
        _apportion([0.5, 0.5], 1)
