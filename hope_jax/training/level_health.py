"""Slow levels that do not learn: a level's gradient, over its parameters, beside that of the others (spec 6.8)."""

from collections import deque
from collections.abc import Iterable, Mapping

from hope_jax.training.telemetry import GRADIENT_RATIO

FRACTION = 0.01  # of the greatest ratio: a level below it learns nothing beside the others
STEPS = 100  # in a row


def ratios(record: Mapping[str, float]) -> dict[str, float]:
    """|gradient| / |parameters| of the CMS levels in a record, fast first.

    >>> ratios({"loss": 2.0, "level_0/gradient_ratio": 0.5, "rest/gradient_ratio": 0.1})
    {'level_0': 0.5}
    """
    end = f"/{GRADIENT_RATIO}"
    return {
        key.removesuffix(end): value for key, value in record.items() if key.startswith("level_") and key.endswith(end)
    }


def dead_levels(steps: Iterable[Mapping[str, float]]) -> list[str]:
    """The levels whose ratio was below `FRACTION` of the greatest in each of the last `STEPS` steps.

    Args:
      steps: the `ratios` of each.

    >>> steps = [{"level_0": 1.0, "level_1": 1e-3}] * STEPS
    >>> dead_levels(steps), dead_levels(steps[1:])
    (['level_1'], [])
    """
    last = deque(steps, maxlen=STEPS)
    if len(last) < STEPS:
        return []
    quiet = [{level for level, ratio in one.items() if ratio < FRACTION * max(one.values())} for one in last]
    return sorted(set.intersection(*quiet))


class Health:
    """Says once of each level that it has stopped to learn."""

    def __init__(self):
        self._last: deque[Mapping[str, float]] = deque(maxlen=STEPS)
        self._said: set[str] = set()

    def news(self, record: Mapping[str, float]) -> list[str]:
        """Warnings after a step, each a line.

        Args:
          record: of the step.
        """
        found = ratios(record)
        if not found:
            return []
        self._last.append(found)
        new = [level for level in dead_levels(self._last) if level not in self._said]
        self._said |= set(new)
        return [
            f"warning: {level} hardly learns: for {STEPS} steps its gradient, over its parameters, was below "
            f"{FRACTION:.0%} of another level's; begin with slow levels alone and add fast ones with --add-level"
            for level in new
        ]
