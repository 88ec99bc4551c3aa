"""What can be read of a run from its directory while it trains, after it, and before it has begun."""

import os
import time
from pathlib import Path
from typing import NamedTuple

from hope_jax.training.checkpoint import saved_step
from hope_jax.training.config import CONFIG_FILE, TrainConfig, read_config
from hope_jax.training.errors import UserError
from hope_jax.training.goodput import Incarnation, Summary, brought_up_to_date, read_goodput, summarize
from hope_jax.training.metrics import METRICS_FILE, parse_records
from hope_jax.training.telemetry import UPDATE_NORM

STALE_AFTER = 60.0  # seconds without a sign of life, outside compilation, evaluations and saves


class View(NamedTuple):
    """A run at an instant."""

    run_dir: Path
    config: TrainConfig
    records: list[dict[str, float]]
    incarnations: list[Incarnation]
    saved: int | None  # step of the latest checkpoint
    now: float  # seconds since 1970

    @property
    def summary(self) -> Summary:
        """Where the time went."""
        return summarize(self.incarnations)

    @property
    def step(self) -> int:
        """The last step that is recorded."""
        return int(max((record["step"] for record in self.records), default=0))

    @property
    def status(self) -> str:
        """A word or a few: what the run is doing, as far as the files say."""
        if not self.incarnations:
            return "not begun" if not self.records else "unknown (trained before goodput.json was written)"
        last = self.incarnations[-1]
        if last.finished:
            return "finished"
        if last.doing == "ended":
            return "stopped before its last step"
        quiet = self.now - last.until
        patience = max(STALE_AFTER, 5 * (self.latest("step_seconds_p95") or 0.0))
        if last.doing == "step":
            return "running" if quiet < patience else f"stale: nothing new for {duration(quiet)}"
        doing = {"compile": "compiling", "eval": "evaluating", "save": "saving", "restore": "restoring"}
        word = doing.get(last.doing, "starting")
        return word if quiet < patience else f"{word}, silent for {duration(quiet)}"

    @property
    def levels(self) -> list[str]:
        """The names of the levels that the records tell of."""
        last = next((record for record in reversed(self.records) if "loss" in record), {})
        return [name.partition("/")[0] for name in last if name.endswith(f"/{UPDATE_NORM}")]

    def latest(self, name: str) -> float | None:
        """The last value of a number, None if it was never recorded."""
        return next((record[name] for record in reversed(self.records) if name in record), None)

    def series(self, name: str) -> list[float]:
        """All values of a number."""
        return [record[name] for record in self.records if name in record]


class Reader:
    """Reads a run again and again, each time only what is new of its records."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self._forget()

    def _forget(self) -> None:
        self._records: list[dict[str, float]] = []
        self._read = 0  # bytes of the file that are among the records
        self._file: int | None = None

    def view(self) -> View | None:
        """The run as it is now; None before its config.yaml is there.

        Raises:
          UserError: its config cannot be read.
        """
        if not (self.run_dir / CONFIG_FILE).exists():
            self._forget()
            return None
        try:
            config = read_config(self.run_dir)
        except (UserError, FileNotFoundError):
            if (self.run_dir / CONFIG_FILE).exists():
                raise
            return None  # removed this moment
        self._catch_up()
        incarnations, saved = brought_up_to_date(read_goodput(self.run_dir), self._records), saved_step(self.run_dir)
        return View(self.run_dir, config, self._records, incarnations, saved, time.time())

    def _catch_up(self) -> None:
        """Takes the whole lines that were added; from the beginning if the file is another one or was cut."""
        try:
            with (self.run_dir / METRICS_FILE).open("rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self._file or stat.st_size < self._read:
                    self._forget()
                    self._file = stat.st_ino
                file.seek(self._read)
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return self._forget()
        if whole:
            self._records += parse_records(whole.decode(errors="replace"))
            self._read += len(whole) + 1


def duration(seconds: float) -> str:
    """A time in the units that a person would use.

    >>> duration(0.0123), duration(75), duration(3700), duration(200_000)
    ('12.3 ms', '1 min 15 s', '1 h 1 min', '2 d 7 h')
    """
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if minutes < 60:
        return f"{minutes} min {int(seconds % 60)} s"
    return f"{hours} h {minutes % 60} min" if hours < 24 else f"{days} d {hours % 24} h"
