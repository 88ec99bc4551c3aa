"""Documents in windows: which tokens of which document stand in which window, and where.

`pack` puts whole documents into windows, longest first, each into the fullest window that still has room
(best-fit decreasing); only a document that is longer than a window is cut. Inputs of a piece begin at a multiple of
`multiple`, so that a model that reads in chunks starts each document with a whole chunk.
"""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of documents; T tokens in S segments of T / S."""

    tokens: np.ndarray  # [B, T]
    targets: np.ndarray  # [B, T] the next tokens
    weights: np.ndarray  # [B, T] float32, 0 at padding and where the next token belongs to another document
    starts: np.ndarray  # [B, S] bool, the memory starts afresh before this segment


class Pieces(NamedTuple):
    """Pieces of documents, sorted by window; P pieces in W windows."""

    offsets: np.ndarray  # [W + 1] window w holds the pieces offsets[w] to offsets[w + 1]
    begin: np.ndarray  # [P] place of a piece's first input in the text
    count: np.ndarray  # [P] its inputs; as many targets, one token further
    slot: np.ndarray  # [P] place of its first input in the window


def sizes(starts: np.ndarray, total: int) -> np.ndarray:
    """Tokens of each document."""
    return np.diff(starts, append=total)


def pack(starts: np.ndarray, total: int, *, length: int, multiple: int) -> Pieces:
    """Packs all documents of a text.

    Args:
      starts: [documents] where each begins, ascending.
      total: tokens of the text.
      length: of a window.
      multiple: of the places where a document may begin; divides `length`.

    >>> pack(np.array([0, 4, 7]), 16, length=8, multiple=2)  # 3, 2 and 8 inputs
    Pieces(offsets=array([0, 1, 3]), begin=array([7, 0, 4]), count=array([8, 3, 2]), slot=array([0, 0, 4]))
    """
    inputs = np.maximum(sizes(starts, total) - 1, 0)  # the last token of a document is a target only
    cuts = -(-inputs // length)
    of = np.repeat(np.arange(starts.size), cuts)
    nth = np.arange(of.size) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    begin, count = starts[of] + nth * length, np.minimum(inputs[of] - nth * length, length)
    order = np.argsort(-count, kind="stable")
    window, slot = _best_fit(-(-count[order] // multiple), length // multiple)
    by_window = np.argsort(window, kind="stable")
    order, slot = order[by_window], slot[by_window] * multiple
    windows = int(window.max(initial=-1)) + 1
    offsets = np.searchsorted(window[by_window], np.arange(windows + 1))
    return Pieces(offsets, begin[order], count[order], slot)


def _best_fit(needs: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Window and place of each need, in the order given; both count from 0."""
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r: some window has room for r
    windows = 0
    window, slot = np.empty(needs.size, np.int64), np.empty(needs.size, np.int64)
    for i, need in enumerate(needs.tolist()):
        if fitting := rooms >> need:
            room = need + (fitting & -fitting).bit_length() - 1
            at = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, at, windows = capacity, windows, windows + 1
        window[i], slot[i] = at, capacity - room
        if room > need:
            by_room[room - need].append(at)
            rooms |= 1 << (room - need)
    return window, slot


def padding(length: int, multiple: int, dtype: np.dtype) -> Batch:
    """A row of padding, without the batch axis."""
    tokens, targets = np.zeros(length, dtype), np.zeros(length, dtype)
    return Batch(tokens, targets, np.zeros(length, np.float32), np.zeros(length // multiple, bool))


def put(into: Batch, text: np.ndarray, begin: int, count: int, slot: int) -> None:
    """Writes `count` inputs from `begin` on, and their targets, into a row."""
    into.tokens[slot : slot + count] = text[begin : begin + count]
    into.targets[slot : slot + count] = text[begin + 1 : begin + 1 + count]
    into.weights[slot : slot + count] = 1


def stack(rows: list[Batch]) -> Batch:
    """Rows as a batch."""
    return Batch(*(np.stack(leaves) for leaves in zip(*rows, strict=True)))


def packed_row(text: np.ndarray, pieces: Pieces, window: int, *, length: int, multiple: int) -> Batch:
    """Window number `window` of a packed text."""
    made = padding(length, multiple, text.dtype)
    for i in range(pieces.offsets[window], pieces.offsets[window + 1]):
        put(made, text, int(pieces.begin[i]), int(pieces.count[i]), int(pieces.slot[i]))
        made.starts[pieces.slot[i] // multiple] = True
    return made


def efficiency(pieces: Pieces, length: int) -> float:
    """Share of the places in all windows that hold an input."""
    return float(pieces.count.sum() / max(1, (pieces.offsets.size - 1) * length))
