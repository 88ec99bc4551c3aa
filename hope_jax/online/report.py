"""What a session says about what it has read."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from hope_jax.online.stream import ChunkReport

DEAD = 1e-3  # a level whose gradient is below this share of the greatest does not learn (spec 6.8)


class LevelReport(NamedTuple):
    """One level over the chunks of a call."""

    name: str  # "level_0" is the fastest
    chunk_size: int  # tokens per write
    updates: int  # how often it changed
    pending: int  # tokens that wait for its next write
    step: float  # norm of its last change over the norm of its start weights
    gradient: float  # norm of the mean gradient of its last write after which it went on; nan if it only started again
    moved: float  # distance from its start weights over their norm; nan without a whole chunk
    dead: bool  # its gradient is nothing beside that of the others


class Report(NamedTuple):
    """What `Session.observe` did."""

    tokens: int  # read by this call
    held: int  # of the session, not yet a whole chunk; they are read with the next tokens
    before: float  # nats per token of the chunks, each at the weights that read it; nan without a whole chunk
    after: float  # the same at the weights that each chunk left behind
    written: float  # share of the chunks that the gate let through
    rolled_back: int  # chunks that were undone because something in them was not finite
    new_contexts: int  # how often a full attention cache was emptied
    levels: tuple[LevelReport, ...]
    chunks: ChunkReport  # arrays [chunks, ...], in the order of the stream

    @property
    def warnings(self) -> list[str]:
        """What a user should know, one sentence each."""
        found = []
        if self.rolled_back:
            found.append(
                f"{self.rolled_back} chunks gave numbers that are not finite and were rolled back; "
                "lower cms_eta, set max_moved, or forget a level"
            )
        found += [
            f"{level.name} (every {level.chunk_size} tokens) hardly learns" for level in self.levels if level.dead
        ]
        return found

    def __str__(self) -> str:
        if not math.isfinite(self.before):
            return f"{self.tokens} tokens read, {self.held} wait for a whole chunk"
        levels = ", ".join(f"{level.name} wrote {level.updates}x, moved {level.moved:.3f}" for level in self.levels)
        learned = (
            f"{self.before:.3f} -> {self.after:.3f} nats/token" if self.levels else f"{self.before:.3f} nats/token"
        )
        return f"{self.tokens} tokens, {learned}" + (f"; {levels}" if levels else "")


def join(reports: Sequence[ChunkReport], size: int, depth: int) -> ChunkReport:
    """The reports [chunks, ...] of several calls, or of none, after each other.

    Args:
      reports: of a session's calls.
      size: tokens of a chunk.
      depth: levels that learn.

    Example:
      >>> join([], 8, 2).fired.shape
      (0, 2)
    """
    number, flag = np.zeros(0, np.float32), np.zeros(0, bool)
    levels = np.zeros((0, depth), np.float32)
    none = ChunkReport(
        losses=np.zeros((0, size), np.float32),
        before=number,
        after=number,
        wrote=flag,
        rolled_back=flag,
        fired=levels.astype(bool),
        step=levels,
        gradient=levels,
        moved=levels,
    )
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), none, *reports)


def summarize(
    chunks: ChunkReport,
    *,
    tokens: int,
    held: int,
    written: int,
    clocks: tuple[int, ...],
    new_contexts: int,
) -> Report:
    """A report of a call.

    Args:
      chunks: arrays [chunks, ...].
      tokens: of the call.
      held: tokens that wait for a whole chunk.
      written: tokens since the slowest level's last write that are in whole chunks.
      clocks: chunk size of each level.
      new_contexts: of the call.
    """
    ran = ~chunks.rolled_back
    changed = chunks.fired & (chunks.step > 0)  # due, and something was taught since the last time
    gradients = [_last_known(chunks.gradient[changed[:, i], i]) for i in range(len(clocks))]
    least = DEAD * max((gradient for gradient in gradients if not math.isnan(gradient)), default=0.0)
    # A level that never changes is dead if every chunk taught; else it may not have been its turn.
    learned = changed.any(axis=0) | ~(chunks.fired.any(axis=0) & chunks.wrote.all())
    levels = tuple(
        LevelReport(
            name=f"level_{i}",
            chunk_size=clock,
            updates=int(changed[:, i].sum()),
            pending=written % clock + held,
            step=_last_known(chunks.step[changed[:, i], i]),
            gradient=gradients[i],
            moved=float(chunks.moved[-1, i]) if len(chunks.moved) else math.nan,
            dead=bool(~learned[i]) or (bool(changed[:, i].any()) and gradients[i] < least),
        )
        for i, clock in enumerate(clocks)
    )
    return Report(
        tokens=tokens,
        held=held,
        before=_mean(chunks.before[ran]),
        after=_mean(chunks.after[ran]),
        written=_mean(chunks.wrote),
        rolled_back=int(chunks.rolled_back.sum()),
        new_contexts=new_contexts,
        levels=levels,
        chunks=chunks,
    )


def _last_known(values: np.ndarray) -> float:
    """0 of no values, nan if none of them is known."""
    known = values[~np.isnan(values)]
    return float(known[-1]) if known.size else math.nan if values.size else 0.0


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else math.nan
