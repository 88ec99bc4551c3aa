"""Where the wall time of a run goes, over all the processes that trained it: RUN/goodput.json.

An incarnation is one call of `train`. Every instant of it belongs to one category; what an incarnation leaves to its
successor is the gap between them ("down") and the steps that were not saved and are taken again ("repeated"). Goodput
is the share of "step" in the sum of all of them.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hope_jax.training.files import write_text
from hope_jax.training.metrics import read_metrics

GOODPUT_FILE = "goodput.json"
CATEGORIES: tuple[str, ...] = ("step", "compile", "eval", "save", "restore", "other")
WRITE_EVERY = 5.0  # seconds


class Incarnation(NamedTuple):
    """What one process did."""

    began: float  # seconds since 1970
    until: float  # the last that is known of it
    first_step: int  # the step it continued from
    last_step: int
    doing: str  # a category, or "ended"
    finished: bool  # the last step was reached: what comes later is another wish, not a restart
    seconds: dict[str, float]  # by category


class Summary(NamedTuple):
    """Of all incarnations of a run."""

    seconds: dict[str, float]  # by category, with "repeated" and "down"

    @property
    def wall(self) -> float:
        """Seconds from the beginning of the run; the time after it was finished, before it went on, left out."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of steps that counted."""
        return self.seconds["step"] / self.wall if self.wall else 0.0


def summarize(incarnations: Sequence[Incarnation]) -> Summary:
    """Adds up the incarnations of a run, oldest first.

    >>> first = Incarnation(0, 20, 0, 10, "step", False, {"step": 15, "compile": 5})
    >>> second = Incarnation(30, 40, 8, 16, "ended", True, {"step": 8, "restore": 2})
    >>> found = summarize([first, second])
    >>> found.seconds["step"], found.seconds["repeated"], found.seconds["down"], found.wall, found.goodput
    (20.0, 3.0, 10.0, 40.0, 0.5)
    """
    seconds = dict.fromkeys((*CATEGORIES, "repeated", "down"), 0.0)
    for i, this in enumerate(incarnations):
        for category, value in this.seconds.items():
            seconds[category] += value
        later = incarnations[i + 1 :]
        steps = this.last_step - this.first_step
        lost = this.last_step - min((other.first_step for other in later), default=this.last_step)
        if steps and lost > 0:
            repeated = this.seconds.get("step", 0.0) * min(lost / steps, 1.0)
            seconds["step"] -= repeated
            seconds["repeated"] += repeated
        if later and not this.finished:
            seconds["down"] += max(later[0].began - this.until, 0.0)
    return Summary(seconds)


def brought_up_to_date(incarnations: list[Incarnation], records: Sequence[Mapping[str, float]]) -> list[Incarnation]:
    """The incarnations, with the steps of the last one that its metrics.jsonl knows of and the file does not yet.

    The file is written every few seconds, and a process that is killed does not write it once more.
    """
    record = next((record for record in reversed(records) if "seconds" in record), None)
    if not incarnations or record is None or record["step"] <= incarnations[-1].last_step:
        return incarnations
    *earlier, last = incarnations
    more = max(record["seconds"] - sum(sum(row.seconds.values()) for row in incarnations), 0.0)
    seconds = last.seconds | {"step": last.seconds.get("step", 0.0) + more}
    last = last._replace(last_step=int(record["step"]), until=last.until + more, seconds=seconds)
    return [*earlier, last]


class Clock:
    """Accounts for the time of this process, from its making on.

    >>> clock = Clock()
    >>> with clock.doing("compile"):
    ...     clock.now()
    'compile'
    """

    def __init__(self):
        self._began, self._start = time.time(), time.perf_counter()
        self._last = self._start
        self._seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._stack = ["other"]
        self._steps = (0, 0)
        self._path: Path | None = None
        self._earlier: list[Incarnation] = []
        self._written = 0.0
        self.finished = False  # set it when the last step was reached

    def now(self) -> str:
        """The category of this instant."""
        return self._stack[-1]

    @contextmanager
    def doing(self, category: str) -> Iterator[None]:
        """What happens inside belongs to a category, except for what a `doing` within it takes for another."""
        changes = category != self.now()
        self._account()
        self._stack.append(category)
        try:
            if changes:
                self._write()
            yield
        finally:
            self._account()
            self._stack.pop()
            if changes:
                self._write()

    @contextmanager
    def keep(self, run_dir: Path, step: int = 0) -> Iterator[None]:
        """Inside, RUN/goodput.json is kept up to date; at the end it says whether the run is `finished`.

        Args:
          run_dir: an existing directory.
          step: that this process continues from.
        """
        self._steps = (step, step)
        self._earlier = brought_up_to_date(read_goodput(run_dir), read_metrics(run_dir))
        self._path = run_dir / GOODPUT_FILE
        self._write()
        try:
            yield
        finally:
            self._write("ended")

    def starts_at(self, step: int) -> None:
        """The step that this process continues from, where it is not the one that `keep` was told."""
        self._steps = (step, step)

    def step(self, step: int) -> None:
        """A step is done."""
        self._steps = (self._steps[0], step)
        if time.perf_counter() - self._written > WRITE_EVERY:
            self._write()

    def summary(self) -> Summary:
        """Of the whole run up to this instant."""
        return summarize([*self._earlier, self._incarnation(self.now())])

    @property
    def began(self) -> float:
        """When the run began, in seconds since 1970."""
        return self._earlier[0].began if self._earlier else self._began

    @property
    def elapsed(self) -> float:
        """Seconds of this process."""
        return time.perf_counter() - self._start

    @property
    def machine_seconds(self) -> float:
        """Seconds of all processes of the run, without the gaps between them."""
        return sum(sum(other.seconds.values()) for other in self._earlier) + self.elapsed

    def _account(self) -> None:
        now = time.perf_counter()
        self._seconds[self._stack[-1]] += now - self._last
        self._last = now

    def _incarnation(self, doing: str) -> Incarnation:
        self._account()
        until = self._began + self._last - self._start
        return Incarnation(self._began, until, *self._steps, doing, self.finished, dict(self._seconds))

    def _write(self, doing: str | None = None) -> None:
        if self._path is None:
            return
        rows = [*self._earlier, self._incarnation(doing or self.now())]
        write_text(self._path, json.dumps([row._asdict() for row in rows], indent=1) + "\n")
        self._written = time.perf_counter()


def read_goodput(run_dir: Path) -> list[Incarnation]:
    """The incarnations of a run, oldest first; none if there is no file, or one that cannot be read."""
    try:
        rows: list[dict[str, Any]] = json.loads((run_dir / GOODPUT_FILE).read_text())
        return [Incarnation(**row) for row in rows]
    except (OSError, ValueError, TypeError):
        return []
