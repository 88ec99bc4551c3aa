"""How long a step takes, over the last hundred of them."""

import time
from collections import deque

import numpy as np

WINDOW = 100


class StepTimes:
    """Seconds from step to step; what lies between `pause` and the next step is not counted.

    >>> times = StepTimes()
    >>> times.step(), times.median
    (None, None)
    """

    def __init__(self, window: int = WINDOW):
        self._seconds: deque[float] = deque(maxlen=window)
        self._last: float | None = None

    def step(self) -> None:
        """A step is done; the first one after a pause only starts the clock."""
        now = time.perf_counter()
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._last = now

    def pause(self) -> None:
        """Something else than steps begins: compilation, an evaluation, a save."""
        self._last = None

    @property
    def mean(self) -> float | None:
        """Seconds per step, None before the second one."""
        return float(np.mean(self._seconds)) if self._seconds else None

    @property
    def median(self) -> float | None:
        """Half of the steps took less."""
        return self.quantile(0.5)

    def quantile(self, share: float) -> float | None:
        """The time that a share of the steps did not exceed, None before the second one."""
        return float(np.quantile(self._seconds, share)) if self._seconds else None
