"""Batches of bytes as a pure function of (seed, step): the position of the data is one integer.

The training text is cut into windows of `length + 1` bytes that share one byte (the target of the last
position is the first byte of the next window). An epoch is a random order of the windows and a random
starting offset, both drawn from (seed, epoch), so every byte is a target at most once per epoch and any batch
can be computed without the ones before: resuming at step k needs k and nothing else.

`TrainBatches` has the two methods of a grain random-access source (`__len__`, `__getitem__`), so
`grain.MapDataset.source(TrainBatches(...))` prefetches it where reading is slow. Here a batch is a copy of a
few kilobytes, so the loop indexes it directly.
"""

import functools
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from hope_jax.training.errors import UserError


class TrainBatches:
    """Random access to training batches: `batches[step]` is [batch, length + 1] uint8.

    Args:
      data: [bytes] uint8, the training text.
      seed: of the order of the windows.
      batch: windows per step.
      length: predicted bytes per window.
    Raises:
      UserError: the text is shorter than one window.

    >>> batches = TrainBatches(np.arange(100, dtype=np.uint8), seed=0, batch=2, length=8)
    >>> batches[7].shape, bool((batches[7] == batches[7]).all())
    ((2, 9), True)
    """

    def __init__(self, data: np.ndarray, *, seed: int, batch: int, length: int):
        if data.size < 2 * length + 1:
            raise UserError(
                f"the training text has {data.size} bytes, seq_len={length} needs {2 * length + 1} or more; "
                "give a longer text or a smaller seq_len"
            )
        self.data, self.seed, self.batch, self.length = data, seed, batch, length
        # One window less than fits: the offset of an epoch takes up to a window.
        self.windows = (data.size - 1) // length - 1
        self._epoch = functools.lru_cache(maxsize=4)(self._draw_epoch)

    def __len__(self) -> int:
        return sys.maxsize  # epochs follow one another without end

    def __getitem__(self, step: int) -> np.ndarray:
        return np.stack([self.row(step * self.batch + i) for i in range(self.batch)])

    def row(self, item: int) -> np.ndarray:
        """Window number `item` of the endless stream, [length + 1] uint8."""
        epoch, place = divmod(item, self.windows)
        order, offset = self._epoch(epoch)
        start = offset + int(order[place]) * self.length
        return self.data[start : start + self.length + 1]

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng([self.seed, epoch])
        return rng.permutation(self.windows), int(rng.integers(self.length))


class EvalBatch(NamedTuple):
    """Windows of held-out text; padding has weight zero."""

    tokens: np.ndarray  # [batch, length + 1] uint8
    weights: np.ndarray  # [batch, length] float32, 1 where the target counts


def eval_batches(data: np.ndarray, *, batch: int, length: int, limit: int | None = None) -> Iterator[EvalBatch]:
    """Cuts a text into batches in which every byte but the first is a target exactly once.

    Args:
      data: [bytes] uint8, at least two bytes.
      batch: windows per batch; the last batch is padded so that all have one shape.
      length: predicted bytes per window; the model starts each window with an empty memory.
      limit: at most this many batches, taken evenly over the text; None for all of it.
    Yields:
      `EvalBatch`.
    Raises:
      UserError: fewer than two bytes.

    >>> sum(b.weights.sum() for b in eval_batches(np.zeros(100, np.uint8), batch=4, length=8)).item()
    99.0
    """
    if data.size < 2:
        raise UserError(f"the text to evaluate has {data.size} byte; at least two are needed to predict one")
    starts = np.arange(0, data.size - 1, length)
    if limit is not None and len(starts) > limit * batch:
        starts = starts[np.linspace(0, len(starts) - 1, limit * batch).astype(int)]
    for first in range(0, len(starts), batch):
        tokens = np.zeros((batch, length + 1), np.uint8)
        weights = np.zeros((batch, length), np.float32)
        for row, start in enumerate(starts[first : first + batch]):
            window = data[start : start + length + 1]
            tokens[row, : window.size] = window
            weights[row, : window.size - 1] = 1
        yield EvalBatch(tokens, weights)
