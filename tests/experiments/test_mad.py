"""MAD's generators against a reader that replays each sequence with a dictionary."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import mad_tasks
from experiments.mad import TASKS, TINY, MadOptions, class_counts, difficulty, epochs, examples, expand, prepare, scores
from experiments.options import cells
from experiments.training import Batch
from hope_jax.training.errors import UserError

RNG = np.random.default_rng
SEED = itertools.count()


def draw(task, count=40, training=False, **changes):
    setting = ",".join(f"{kind}={value}" for kind, value in changes.items())
    return examples(task, difficulty(f"{task}:{setting or 'baseline'}"), RNG(next(SEED)), count, training=training)


def test_compression_asks_for_what_it_shows():
    batch = draw("compression")
    assert batch.tokens.shape == (40, 32) and (batch.tokens == batch.targets).all() and (batch.weights == 1).all()
    assert (batch.tokens[:, -1] == 15).all()
    assert set(batch.tokens[:, :-1].ravel()) == set(range(15))


def test_recall_scores_the_values_of_keys_that_were_shown():
    batch = draw("in_context_recall", length=32)
    for tokens, targets, weights in zip(*batch, strict=True):
        memory, scored = {}, []
        for at in range(0, 31, 2):  # the last value is only a target
            key, value = int(tokens[at]), int(targets[at])
            assert key < 8 <= value < 16
            scored.append(key in memory)
            assert memory.setdefault(key, value) == value
        assert weights[::2].tolist() == scored and not weights[1::2].any()
        assert scored[-1]
        assert (tokens[1:] == targets[:-1]).all()


def test_recall_asks_last_for_any_key_evenly():
    """The last key is drawn from the different ones shown, however often each was."""
    batch = draw("in_context_recall", count=6000, vocab=4, length=8)
    first, last = batch.tokens[:, 0:6:2], batch.tokens[:, 6]
    both = np.array([set(row) == {0, 1} for row in first])
    lonely = both & (first.sum(axis=1) == 1)  # key 1 shown once, key 0 twice
    assert abs(last[lonely].mean() - 0.5) < 5 * 0.5 / np.sqrt(lonely.sum())
    assert (last[~both] == first[~both, 0]).all()


@pytest.mark.parametrize("training", [True, False])
def test_fuzzy_recall_scores_the_values_of_keys_that_were_shown(training):
    """Motifs end where keys turn into values and back, so a sequence can be read without knowing how it was made."""
    sizes = set()
    for _ in range(60):
        tokens, scored = mad_tasks._fuzzy_row(RNG(next(SEED)), 16, 65, training)
        assert tokens.shape == scored.shape == (65,)
        body = tokens[np.flatnonzero(tokens != 15)[0] :]
        assert (body < 15).all()
        runs = [tuple(map(int, run)) for _, run in itertools.groupby(body, key=lambda token: token < 7)]
        keys, values = runs[::2], runs[1::2]
        memory, expected = {}, [False] * (65 - body.size)
        for key, value in zip(keys, values, strict=True):
            expected += [False] * len(key) + [key in memory] * len(value)
            assert memory.setdefault(key, value) == value
            assert len(set(key)) == len(key) and len(set(value)) == len(value)
        assert scored.tolist() == expected and expected[-1]
        sizes |= {("key", len(key)) for key in keys} | {("value", len(value)) for value in values}
    lengths = (1, 2, 3) if training else (3,)
    assert sizes == {("key", n) for n in lengths} | {("value", n) for n in (1, 2, 3)}


def test_in_training_recall_predicts_every_token():
    for task in ("in_context_recall", "fuzzy_recall"):
        batch = draw(task, training=True, length=32)
        assert (batch.weights == 1).all() and (batch.tokens[:, 1:] == batch.targets[:, :-1]).all()


def test_selective_copying_tells_the_tokens_in_order():
    batch = draw("selective_copying", length=64, copies=5)
    for tokens, targets, weights in zip(*batch, strict=True):
        kept = [token for token in tokens[:58] if token != 14]
        assert len(kept) == 5 and max(kept) < 14
        assert tokens[58] == 15 and (tokens[59:] == 14).all()
        assert np.flatnonzero(weights).tolist() == list(range(59, 64))
        assert targets[59:].tolist() == kept
    places = [np.flatnonzero(row[:58] != 14) for row in batch.tokens]
    assert len({tuple(place) for place in places}) > 30
    assert all(place[-1] == 57 for place in places)  # no blank falls after the last token


def test_memorisation_has_one_map_for_everyone():
    memory = {}
    for _ in range(40):
        batch = draw("memorisation", vocab=32)
        for tokens, targets, weights in zip(*batch, strict=True):
            assert (tokens[1::2] == 31).all() and (weights == np.tile([0, 1], 16)).all()
            for key, value in zip(tokens[::2].tolist(), targets[1::2].tolist(), strict=True):
                assert memory.setdefault(key, value) == value
    assert set(memory) == set(range(15))
    assert len(set(memory.values())) == 15 and set(memory.values()) <= set(range(15, 31))


@pytest.mark.parametrize("task", TASKS)
def test_examples_follow_the_seed_and_differ(task):
    level = difficulty(f"{task}:length=64" + (",copies=5" if task == "selective_copying" else ""))
    first, again = (examples(task, level, RNG(3), 30, training=True) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert len({row.tobytes() for row in first.tokens}) == 30
    assert first.tokens.max() < level.vocab and first.targets.max() < level.vocab


def test_an_epoch_shows_every_example_once():
    pool = Batch(np.arange(10)[:, None], np.arange(10)[:, None], np.ones((10, 1)))
    batches = epochs(pool, RNG(0), 4)
    shown = np.concatenate([next(batches).tokens[:, 0] for _ in range(10)]).reshape(4, 10)
    assert (np.sort(shown, axis=1) == np.arange(10)).all()
    assert len({tuple(row) for row in shown}) == 4


def test_the_score_averages_over_classes():
    """Against a loop: three targets of class 0, all right; one of class 1, taken for class 2; class 3 absent."""
    targets = np.array([[0, 0, 0, 1, 3]])
    logits = np.eye(4)[[[0, 0, 0, 2, 3]]]
    weights = np.array([[1, 1, 1, 1, 0]], np.float32)
    counts = np.asarray(class_counts(jnp.asarray(logits), Batch(targets, targets, weights)))
    assert scores(counts) == {"score": pytest.approx(1 / 3), "accuracy": 0.75}


def test_the_benchmark_has_its_published_settings():
    full = expand("full")
    assert len(set(full)) == len(full) == 52
    assert {difficulty(s).vocab for s in full if s.startswith("memor")} == {256, 512, 1024, 2048, 4096, 8192}
    assert {difficulty(s).length for s in full if s.startswith("compr")} == {32, 64, 128, 256}
    assert set(expand("baseline")) < set(expand("small")) < set(full)
    assert MadOptions(difficulties=("compression", "baseline")).difficulties[:11] == tuple(expand("compression"))


@pytest.mark.parametrize("setting", ["copying", "compression:", "compression:width=3", "compression:vocab=few"])
def test_unknown_settings_are_refused(setting):
    with pytest.raises(UserError, match=r"unknown task|is not a setting"):
        MadOptions(difficulties=(setting,))


def test_a_setting_of_ones_own_has_a_column_of_its_own():
    """So that it never enters the mean that stands beside the published number."""
    tiny = dataclasses.replace(TINY, difficulties=("compression:vocab=32", "compression:length=8"))
    ours = [prepare(cell) for cell in cells(tiny)]
    assert [(job.column, job.setting) for job in ours] == [
        ("compression", "vocab=32"),
        ("compression, length=8", "length=8"),
    ]
