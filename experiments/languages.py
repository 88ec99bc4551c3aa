"""Two new languages, one after the other: what is left of the first after the second was learned?

    python -m experiments.languages --data BIBLES/kjv BIBLES/Basque-NT.xml BIBLES/Swahili-NT.xml [--tiny]

In the manner of the paper's continual translation, without translating: a byte model is trained on a language at home
(English), then streams a first (Basque) and a second (Swahili) language, learning as its learner does
(`experiments/learners.py`); texts are parallel, and every tenth chapter of each is held out. Read with learning
switched off:

    forgotten    bits per byte of the first in the end, less the fewest before (as trained, or right after the first)
    gained       the fewest bits per byte of the second before it was streamed, less those in the end
    both         the mean of the two in the end
    at best      home, first and second at the start, after the first, and in the end, and the second alone (streamed
                 by the trained model that never saw the first), at the rate that is best for "both"

"none" is the learner in context alone, which starts again with every window; "16", "16,64" and "16,64,256" have one,
two and three levels that learn, the levels of one chain that else are frozen. 64,64,64 has the same weights as the
last at one clock. Every inner learning rate is a point of plots/languages_curve.png; see `experiments/domain_stream.py`
for what a curve shows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.domain_stream import TINY as DOMAIN_TINY
from experiments.running import Job, main
from experiments.sources import source
from experiments.streams import AtRates, StreamOptions, curve, cut, held_out, prepare_streams, trace, trade_off
from experiments.training import Scores
from hope_jax.training.errors import UserError

LEARNERS = ("none", "16", "16,64", "16,64,256", "64,64,64", "256,256,256", "meta:16,64,256", "meta:64,64,64")


@dataclasses.dataclass(frozen=True)
class LanguageStreamOptions(StreamOptions):
    """Two languages after a third; data are home, first and second."""

    learners: tuple[str, ...] = LEARNERS
    data: tuple[str, ...] = ("generated-0", "generated-1", "generated-2")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.data) != 3:
            raise UserError(f"data are three texts, at home, first and second; got {list(self.data)}")


_same = {field.name: getattr(DOMAIN_TINY, field.name) for field in dataclasses.fields(DOMAIN_TINY)}
TINY = LanguageStreamOptions(**{**_same, "data": LanguageStreamOptions.data})


def scores(bits_RPT: np.ndarray, alone_R: np.ndarray, rates: Sequence[float]) -> Scores:
    """From the bits of (home, first, second) before the streams and after each, and of the second alone."""
    best, found = curve(rates, trade_off(bits_RPT[:, :, 1:]))
    for phase, when in enumerate(("start", "between", "end")):
        names = ("home", "first", "second")
        found |= {f"bits_{name}_{when}": float(bits_RPT[best, phase, i]) for i, name in enumerate(names)}
    return {**found, "bits_second_alone": float(alone_R[best])}


def prepare(cell: LanguageStreamOptions) -> Job:
    """What one cell computes."""
    home, first, second = map(source, cell.data)
    texts = [cut(language.train, cell) for language in (first, second)]
    tests = [held_out(language, cell) for language in (home, first, second)]

    def score(learners: AtRates, params: Any) -> Scores:
        alone_R = trace(learners, params, texts[1:], tests[2:])[:, -1, 0]
        return scores(trace(learners, params, texts, tests), alone_R, learners.rates)

    return prepare_streams(cell, home.train, score)


if __name__ == "__main__":
    main("languages", LanguageStreamOptions, TINY, prepare)
