"""Streams A, B, A: what is left of A after B was learned, and what was gained on B?

    python -m experiments.domain_stream [--data A B] [--learners 16,64,256 64,64,64 ...] [--rates 0.1 1 ...] [--tiny]

A byte model is trained on the first 60% of A's training text. Then it streams a part of the rest of A, text of B, and
the other part of the rest of A, learning as its learner does (`experiments/learners.py`). Held-out A and B are read
with learning switched off after each:

    forgotten    bits per byte of A after B, less the fewest before (as trained, or after the first stream of A)
    gained       the fewest bits per byte of B before it was streamed, less those after it
    both         the mean of A and B after B
    at best      the bits of A and B before B, after B and after the second A, at the rate that is best for "both"

Every inner learning rate is a point and every learner a curve, in plots/domain_stream_curve.png. A smaller rate forgets
less too, so several levels are better than one where their curve lies below those of one level (64,64,64: the same
weights, all at one clock), at the gains that both reach.

Ablations are learners too: "all:64" has no frozen base, "meta:16,64,256" has starts that were trained through the
writes, "sleep:16,64,256" consolidates its fast level after each text. `--models transformer --learners 16,64 64,16`
(two layers) has the slow level behind the fast one, and before it.

Cost at the defaults, in processor time of a busy two-core machine: a minute of training, shared by the learners of one
call unless their starts are meta-learned, and about 40 seconds more per learner. A training step through the writes
cost five times a plain one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.options import TINY_RESULTS
from experiments.running import Job, main
from experiments.sources import source
from experiments.streams import AtRates, StreamOptions, curve, cut, held_out, prepare_streams, trace, trade_off
from experiments.training import Scores
from hope_jax.training.errors import UserError

TRAINED, FIRST = 0.6, 0.8  # of A: where the text of the training and that of the first stream end
CLOCKS = ("16,64,256", "16,16,16", "64,64,64", "256,256,256")
LEARNERS = (*CLOCKS, "all:64", "sleep:16,64,256", "meta:16,64,256", "meta:64,64,64")


@dataclasses.dataclass(frozen=True)
class DomainOptions(StreamOptions):
    """Streams A, B, A; data are A and B."""

    learners: tuple[str, ...] = LEARNERS
    data: tuple[str, ...] = ("generated-0", "generated-1")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.data) != 2:
            raise UserError(f"data are two texts, A and B; got {list(self.data)}")


TINY = DomainOptions(
    learners=("4,8",),
    rates=(0.1, 1.0),
    steps=2,
    batch_size=2,
    dim=8,
    head_width=4,
    layers=2,
    levels=2,
    length=16,
    windows=2,
    test_windows=2,
    chunks=(4,),
    results=TINY_RESULTS,
)


def scores(bits_RPT: np.ndarray, rates: Sequence[float]) -> Scores:
    """From the bits of A and B before the streams and after A, B and A."""
    best, found = curve(rates, trade_off(bits_RPT[:, :3]))
    for phase, when in enumerate(("start", "before", "after", "again")):
        found |= {f"bits_{name}_{when}": float(bits_RPT[best, phase, i]) for i, name in enumerate("ab")}
    return found


def prepare(cell: DomainOptions) -> Job:
    """What one cell computes."""
    a, b = map(source, cell.data)
    trained, first = (int(share * a.train.size) for share in (TRAINED, FIRST))
    texts = [cut(streamed, cell) for streamed in (a.train[trained:first], b.train, a.train[first:])]
    tests = [held_out(corpus, cell) for corpus in (a, b)]

    def score(learners: AtRates, params: Any) -> Scores:
        return scores(trace(learners, params, texts, tests), learners.rates)

    return prepare_streams(cell, a.train[:trained], score)


if __name__ == "__main__":
    main("domain_stream", DomainOptions, TINY, prepare)
