"""Batches are a function of (seed, step), and evaluation counts every byte once."""

import numpy as np
import pytest

from hope_jax.training.data import TrainBatches, eval_batches
from hope_jax.training.errors import UserError

DATA = np.arange(1_000, dtype=np.uint16).astype(np.uint8)


def batches(seed=0, batch=3, length=10, data: np.ndarray = DATA):
    return TrainBatches(data, seed=seed, batch=batch, length=length)


def test_random_access_equals_reading_in_order():
    ordered = batches()
    in_order = [ordered[step] for step in range(120)]  # several epochs
    for step in (119, 0, 57, 98):
        np.testing.assert_array_equal(batches()[step], in_order[step])


def test_seed_changes_the_order():
    assert not np.array_equal(batches(seed=1)[0], batches(seed=2)[0])


def test_an_epoch_reads_every_window_once():
    positions = np.arange(1_000, dtype=np.int64)
    source = batches(data=positions, batch=1)
    starts = [int(source[step][0, 0]) for step in range(source.windows)]
    assert len(set(starts)) == source.windows
    assert len({start % 10 for start in starts}) == 1  # windows do not overlap
    assert 10 * source.windows >= 1_000 - 21


def test_windows_are_consecutive_bytes_of_the_text():
    for step in range(40):
        for row in batches()[step].astype(int):
            np.testing.assert_array_equal(np.diff(row) % 256, 1)


def test_too_short_text_names_the_sizes():
    with pytest.raises(UserError, match=r"15 bytes.*seq_len=10.*smaller seq_len"):
        batches(data=DATA[:15])
    assert batches(data=DATA[:21])[5].shape == (3, 11)


@pytest.mark.parametrize("size", [2, 10, 11, 12, 95, 101])
def test_evaluation_predicts_every_byte_but_the_first_once(size):
    targets = []
    for batch in eval_batches(DATA[:size], batch=3, length=10):
        assert batch.tokens.shape == (3, 11) and batch.weights.shape == (3, 10)
        targets.extend(batch.tokens[:, 1:][batch.weights == 1].tolist())
    assert targets == DATA[1:size].tolist()


def test_limited_evaluation_is_spread_over_the_text():
    found = list(eval_batches(DATA, batch=2, length=10, limit=3))
    assert len(found) == 3
    assert found[0].tokens[0, 0] == 0
    assert found[-1].tokens[-1, 0] == DATA[990]


def test_nothing_to_predict():
    with pytest.raises(UserError, match="at least two"):
        list(eval_batches(DATA[:1], batch=1, length=4))
