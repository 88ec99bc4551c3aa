"""Lanes: every row of the global batch reads one stream of documents, from step to step.

An epoch is all documents in an order drawn from (seed, epoch), one after the other, cut into as many equal stretches
as there are lanes; the last stretch ends in padding. So every target occurs once per epoch, a lane goes on where it
stopped, and any row can be computed without those before it.
"""

import functools
from typing import NamedTuple

import numpy as np

from hope_jax.training.packing import Batch, padding, put, sizes


class _Epoch(NamedTuple):
    """The stream of an epoch; documents without room in it are left out."""

    begin: np.ndarray  # [documents] place of each in the text, in the order of the epoch
    count: np.ndarray  # [documents] places that hold its tokens
    place: np.ndarray  # [documents] where it begins in the stream


class Lanes:
    """Rows of the lanes that read one text.

    Args:
      text: [tokens].
      starts: [documents] where each document begins.
      seed: of the order of the documents.
      lanes: how many rows of the batch read this text.
      length: tokens of a row and step.
      multiple: 0 for documents that follow each other without a boundary: the last token of one predicts the first of
        the next. Otherwise each document begins at a multiple of it, with a fresh memory.
    """

    def __init__(self, text: np.ndarray, starts: np.ndarray, *, seed: int, lanes: int, length: int, multiple: int):
        self.text, self.seed, self.lanes, self.length, self.multiple = text, seed, lanes, length, multiple
        self._starts = starts
        count = sizes(starts, text.size)
        self._count = count if not multiple else np.maximum(count - 1, 0)
        self._room = self._count if not multiple else -(-self._count // multiple) * multiple
        self.places = int(self._room.sum())  # of the stream of an epoch, padding included
        self.steps = -(-self.places // (lanes * length))  # per epoch
        self.targets = int(self._count.sum()) - (not multiple)
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    def row(self, step: int, lane: int) -> Batch:
        """What a lane reads in a step, without the batch axis."""
        epoch, nth = divmod(step, self.steps)
        first = (lane * self.steps + nth) * self.length
        return self._cut(epoch, first) if self.multiple else self._join(epoch, first, step == 0)

    def _cut(self, epoch: int, first: int) -> Batch:
        """With a boundary between documents."""
        made = padding(self.length, self.multiple, self.text.dtype)
        made.starts[0] = first % (self.steps * self.length) == 0  # the lane goes on elsewhere
        for begin, count, slot, whole in self._spans(epoch, first, self.length):
            put(made, self.text, begin, count, slot)
            made.starts[slot // self.multiple] |= whole
        return made

    def _join(self, epoch: int, first: int, first_of_run: bool) -> Batch:
        """Without one; only the first row of a run starts afresh."""
        read = np.zeros(self.length + 1, self.text.dtype)
        filled = 0
        for begin, count, slot, _ in self._spans(epoch, first, self.length + 1):
            read[slot : slot + count] = self.text[begin : begin + count]
            filled = slot + count
        weights = (np.arange(1, self.length + 1) < filled).astype(np.float32)
        return Batch(read[:-1], read[1:], weights, np.array([first_of_run]))

    def _spans(self, epoch: int, first: int, length: int):
        """Of the places from `first` on: (place in the text, tokens, place in the row, whether a document begins)."""
        order = self._epoch(epoch)
        i = int(np.searchsorted(order.place, first, side="right")) - 1
        while i < order.place.size and order.place[i] < first + length:
            skip = max(0, first - int(order.place[i]))
            slot = max(0, int(order.place[i]) - first)
            count = min(int(order.count[i]) - skip, length - slot)
            if count > 0:
                yield int(order.begin[i]) + skip, count, slot, skip == 0
            i += 1

    def _draw_epoch(self, epoch: int) -> _Epoch:
        order = np.random.default_rng([self.seed, epoch]).permutation(self._count.size)
        order = order[self._count[order] > 0]
        room = self._room[order]
        return _Epoch(self._starts[order], self._count[order], np.cumsum(room) - room)
