"""Learners of a stream compared where they have gained the same: how much has each forgotten there?"""

import itertools
from collections.abc import Mapping

from experiments.cells import NONE, Best, mean_and_spread
from experiments.published import FORGOTTEN, GAINED

GAINS = (0.5, 0.7, 0.9, 1.1)  # bits per byte of the second text


def forgotten_at(scores: Mapping[str, float], gain: float) -> float | None:
    """Bits forgotten where a curve over inner learning rates reaches a gain, between two rates on a straight line.

    Args:
      scores: of a record.
      gain: in bits per byte.

    Returns:
      The least, where the curve is there more than once; None where it never is.

    >>> curve = {"bits_gained_at_1": 1.0, "bits_forgotten_at_1": 0.5, "bits_gained_at_0.1": 0.5}
    >>> curve |= {"bits_forgotten_at_0.1": 0.25}
    >>> forgotten_at(curve, 0.75), forgotten_at(curve, 1.5)
    (0.375, None)
    """
    rates = sorted((name.removeprefix(GAINED) for name in scores if name.startswith(GAINED)), key=float)
    points = [(scores[f"{GAINED}{rate}"], scores[f"{FORGOTTEN}{rate}"]) for rate in rates]
    found = [
        before + (after - before) * (gain - less) / (more - less)
        for (less, before), (more, after) in itertools.pairwise(points)
        if min(less, more) <= gain <= max(less, more) and less != more
    ]
    return min(found, default=None)


def rows(cells: Mapping[tuple[str, str], Mapping[str, Best]]) -> list[list[str]]:
    """Learner, text, and a cell per gain: mean and spread of the seeds that reach it, and how many if not all do."""
    found = []
    for (model, column), settings in sorted(cells.items()):
        for best in settings.values():
            shown = [_show(best, gain) for gain in GAINS]
            if any(cell != NONE for cell in shown):
                found.append([model, column, *shown])
    return found


def _show(best: Best, gain: float) -> str:
    values = [value for record in best.records if (value := forgotten_at(record.scores, gain)) is not None]
    if not values:
        return NONE
    missing = f" [{len(values)} of {len(best.records)}]" if len(values) < len(best.records) else ""
    return mean_and_spread(values) + missing
