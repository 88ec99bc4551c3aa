"""Training batches as a pure function of (seed, step): the position of the data is one integer.

Every kind of batches has `batches[step]`, the global batch of a step, and `rows(step, which)`, some of its rows. The
global batch does not depend on the number of hosts, each of which makes the rows of its own devices and no others, and
resuming at step k needs k and nothing else.

`TrainBatches` cuts the text into windows of `length + 1` tokens that share one (the target of the last position is the
first token of the next window). An epoch is a random order of the windows and a random starting offset, both drawn
from (seed, epoch), so every token is a target at most once per epoch. `DocumentBatches` orders windows of whole
documents (`packing.py`), `MixedBatches` takes each row from one of several texts, `LaneBatches` lets each row read one
stream (`lanes.py`).
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from hope_jax.training.errors import UserError
from hope_jax.training.lanes import Lanes
from hope_jax.training.packing import Batch, Pieces, pack, packed_row, padding, stack

if TYPE_CHECKING:
    from hope_jax.training.config import TrainConfig
    from hope_jax.training.mixture import Mixture

THREADS = 4  # that read batches from the disk ahead of the step
AHEAD = 8  # batches


class Batches(Protocol):
    """Random access to the batches of a run, without end."""

    on_disk: bool  # reading may wait, so it is worth reading ahead

    def __getitem__(self, step: int) -> Any:
        """The global batch of a step."""
        ...

    def rows(self, step: int, which: Sequence[int]) -> Any:
        """Some rows of it, by their number."""
        ...


class TrainBatches:
    """Random access to training batches: `batches[step]` is [batch, length + 1], of the dtype of the text.

    Args:
      data: [tokens], the training text.
      seed: of the order of the windows.
      batch: windows per step.
      length: predicted tokens per window.
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
        self.on_disk = isinstance(data, np.memmap)
        # One window less than fits: the offset of an epoch takes up to a window.
        self.windows = (data.size - 1) // length - 1
        self._epoch = functools.lru_cache(maxsize=4)(self._draw_epoch)

    def __len__(self) -> int:
        return sys.maxsize  # epochs follow one another without end

    def __getitem__(self, step: int) -> np.ndarray:
        return self.rows(step, range(self.batch))

    def rows(self, step: int, which: Sequence[int]) -> np.ndarray:
        """Some rows of the batch of a step, [len(which), length + 1]."""
        return np.stack([self.row(step * self.batch + i) for i in which])

    def row(self, item: int) -> np.ndarray:
        """Window number `item` of the endless stream, [length + 1] uint8."""
        epoch, place = divmod(item, self.windows)
        order, offset = self._epoch(epoch)
        start = offset + int(order[place]) * self.length
        return self.data[start : start + self.length + 1]

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng([self.seed, epoch])
        return rng.permutation(self.windows), int(rng.integers(self.length))


class DocumentBatches:
    """As `TrainBatches`, of documents: `batches[step]` is a `Batch` whose rows hold pieces of separate documents.

    An epoch is all windows of the packed text in an order drawn from (seed, epoch): every target once.

    Args:
      data: [tokens], the training text.
      starts: [documents] where each document begins.
      seed: of the order of the windows.
      batch: windows per step.
      length: places per window.
      multiple: of the places where a document may begin.
    Raises:
      UserError: no document has a target.
    """

    def __init__(self, data: np.ndarray, starts: np.ndarray, *, seed: int, batch: int, length: int, multiple: int):
        self.data, self.seed, self.batch, self.length, self.multiple = data, seed, batch, length, multiple
        self.on_disk = isinstance(data, np.memmap)
        self.pieces: Pieces = pack(starts, data.size, length=length, multiple=multiple)
        self.windows = self.pieces.offsets.size - 1
        if not self.windows:
            raise UserError("no document of the training text has two tokens; give a source with some text in it")
        self._order = functools.lru_cache(maxsize=4)(self._draw_order)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> Batch:
        return self.rows(step, range(self.batch))

    def rows(self, step: int, which: Sequence[int]) -> Batch:
        """Some rows of the batch of a step."""
        return stack([self.row(step * self.batch + i) for i in which])

    def row(self, item: int) -> Batch:
        """Window number `item` of the endless stream, without the batch axis."""
        epoch, place = divmod(item, self.windows)
        return packed_row(
            self.data, self.pieces, int(self._order(epoch)[place]), length=self.length, multiple=self.multiple
        )

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.windows)


class _Source:
    """The rows of one text as a grain source."""

    def __init__(self, batches: TrainBatches | DocumentBatches):
        self.batches = batches

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Any:
        return self.batches.row(index)


class MixedBatches:
    """Each row from one of several texts, as often as its share says; each text goes through its own epochs.

    Args:
      parts: the rows of each text, all of one kind and length.
      shares: of the rows, above 0.
      batch: windows per step.
    """

    def __init__(self, parts: Sequence[TrainBatches | DocumentBatches], shares: Sequence[float], *, batch: int):
        import grain

        self.batch, self.on_disk = batch, any(part.on_disk for part in parts)
        sources = [grain.MapDataset.source(_Source(part)) for part in parts]
        self._mixed = grain.MapDataset.mix(sources, list(shares))

    def __getitem__(self, step: int) -> Any:
        return self.rows(step, range(self.batch))

    def rows(self, step: int, which: Sequence[int]) -> Any:
        """Some rows of the batch of a step."""
        made: list[Any] = [self._mixed[step * self.batch + i] for i in which]
        return stack(made) if isinstance(made[0], Batch) else np.stack(made)


class LaneBatches:
    """Each row of the batch reads one stream from step to step (`lanes.py`); several texts divide the rows.

    Args:
      texts: (tokens, starts of the documents) of each text.
      shares: of the rows, above 0; every text gets at least one.
      seed, length, multiple: see `Lanes`.
      batch: rows.
    Raises:
      UserError: there are more texts than rows, or a text has no target.
    """

    def __init__(self, texts, shares: Sequence[float], *, seed: int, batch: int, length: int, multiple: int):
        self.batch, self.on_disk = batch, any(isinstance(text, np.memmap) for text, _ in texts)
        counts = _apportion(shares, batch)
        self.lanes = [
            Lanes(text, starts, seed=seed, lanes=lanes, length=length, multiple=multiple)
            for (text, starts), lanes in zip(texts, counts, strict=True)
        ]
        if not all(lanes.targets > 0 for lanes in self.lanes):
            raise UserError("a training text has no two tokens in a row; give sources with some text in them")
        self._lane_of_row = [(lanes, i) for lanes in self.lanes for i in range(lanes.lanes)]

    def __getitem__(self, step: int) -> Batch:
        return self.rows(step, range(self.batch))

    def rows(self, step: int, which: Sequence[int]) -> Batch:
        """Some rows of the batch of a step."""
        return stack([lanes.row(step, i) for lanes, i in map(self._lane_of_row.__getitem__, which)])


def _apportion(shares: Sequence[float], rows: int) -> list[int]:
    """Whole rows by share, largest remainders first, none without a row."""
    if len(shares) > rows:
        raise UserError(f"batch_size={rows} rows cannot carry {len(shares)} sources, one lane each; make it larger")
    exact = np.array(shares) / sum(shares) * rows
    counts = np.maximum(np.floor(exact).astype(int), 1)
    while counts.sum() < rows:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > rows:  # the sources that were lifted to a row take it from the others
        counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
    return counts.tolist()


def training_batches(mixture: "Mixture", config: "TrainConfig") -> Batches:
    """The batches of a run.

    Raises:
      UserError: a text is too short, or the batch has too few rows for the sources.
    """
    texts = [(corpus.train, corpus.train_starts) for corpus in mixture.corpora]
    sizes = {"seed": config.seed, "batch": config.batch_size, "length": config.seq_len}
    if config.documents in ("carry", "carry_reset"):
        multiple = config.segment if config.documents == "carry_reset" else 0
        return LaneBatches(texts, mixture.shares, multiple=multiple, **sizes)
    if config.documents == "reset":
        parts = [DocumentBatches(text, starts, multiple=config.segment, **sizes) for text, starts in texts]
    else:
        parts = [TrainBatches(text, **sizes) for text, _ in texts]
    return parts[0] if len(parts) == 1 else MixedBatches(parts, mixture.shares, batch=config.batch_size)


def feed(batches: Batches, start: int, stop: int, rows: Sequence[int] | None = None) -> Iterator[Any]:
    """The batches of steps start to stop, read ahead in threads if they lie on the disk.

    Args:
      batches: random access to them.
      start, stop: steps; the position of the data is the step and nothing else.
      rows: that this host needs; None for all.
    """

    def make(step: int) -> Any:
        return batches[step] if rows is None else batches.rows(step, rows)

    if not batches.on_disk:  # a copy of a few kilobytes
        return map(make, range(start, stop))
    import grain

    steps = grain.MapDataset.range(start, stop).map(make)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)))


class EvalBatch(NamedTuple):
    """Windows of held-out text; padding has weight zero."""

    tokens: Any  # [batch, length + 1], or a `Batch` of documents
    weights: np.ndarray  # [batch, length] float32, 1 where the target counts


def eval_batches(data: np.ndarray, *, batch: int, length: int, limit: int | None = None) -> Iterator[EvalBatch]:
    """Cuts a text into batches in which every token but the first is a target exactly once.

    Args:
      data: [tokens], at least two.
      batch: windows per batch; the last batch is padded so that all have one shape.
      length: predicted tokens per window; the model starts each window with an empty memory.
      limit: at most this many batches, taken evenly over the text; None for all of it.
    Yields:
      `EvalBatch`.
    Raises:
      UserError: fewer than two tokens.

    >>> sum(b.weights.sum() for b in eval_batches(np.zeros(100, np.uint8), batch=4, length=8)).item()
    99.0
    """
    if data.size < 2:
        raise UserError(f"the text to evaluate has {data.size} token; at least two are needed to predict one")
    starts = np.arange(0, data.size - 1, length)
    if limit is not None and len(starts) > limit * batch:
        starts = starts[np.linspace(0, len(starts) - 1, limit * batch).astype(int)]
    for first in range(0, len(starts), batch):
        tokens = np.zeros((batch, length + 1), data.dtype)
        weights = np.zeros((batch, length), np.float32)
        for row, start in enumerate(starts[first : first + batch]):
            window = data[start : start + length + 1]
            tokens[row, : window.size] = window
            weights[row, : window.size - 1] = 1
        yield EvalBatch(tokens, weights)


def document_eval_batches(
    data: np.ndarray, starts: np.ndarray, *, batch: int, length: int, multiple: int, limit: int | None = None
) -> Iterator[EvalBatch]:
    """As `eval_batches`, of documents: every token that is not the first of a document is a target exactly once.

    Raises:
      UserError: no document has two tokens.
    """
    pieces = pack(starts, data.size, length=length, multiple=multiple)
    windows = np.arange(pieces.offsets.size - 1)
    if not windows.size:
        raise UserError("no document of the text to evaluate has two tokens; give a longer text")
    if limit is not None and windows.size > limit * batch:
        windows = windows[np.linspace(0, windows.size - 1, limit * batch).astype(int)]
    for first in range(0, windows.size, batch):
        rows = [
            packed_row(data, pieces, int(window), length=length, multiple=multiple)
            for window in windows[first : first + batch]
        ]
        rows += [padding(length, multiple, data.dtype)] * (batch - len(rows))
        made = stack(rows)
        yield EvalBatch(made, made.weights)
