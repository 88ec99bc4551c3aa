"""Says so when a run stands still: which process, at which step, and where in the program; ends nothing."""

import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from hope_jax.training import distributed

LAST_WORDS = 1.0  # seconds
STALLS_FILE = "stalls.txt"
STALL = "stall"


class Watchdog:
    """Reports, from a thread of its own, that no step has finished for some time; use as a context manager.

    Args:
      seconds: how long a step, with the evaluation or save before it, may take.
      run_dir: where `stalls.txt` is appended to; stderr gets the same.
    """

    def __init__(self, seconds: float, run_dir: Path):
        self._seconds, self._path = seconds, run_dir / STALLS_FILE
        self._step, self._since, self._reported = 0, time.monotonic(), False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int) -> None:
        """The run is alive, and has sent this step to the devices."""
        if self._reported:
            distributed.withdraw(STALL)
        self._step, self._since, self._reported = step, time.monotonic(), False

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds / 10):
            if not self._reported and time.monotonic() - self._since > self._seconds:
                self._reported = True
                self._report()

    def _report(self) -> None:
        missing = distributed.roll_call(STALL, max(distributed.ROLL_CALL_SECONDS, self._seconds / 5))
        silent = f"; no answer from process {', '.join(map(str, missing))}" if missing else ""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        text = (
            f"hope: process {distributed.index()} has finished no step for {self._seconds:g} s, "
            f"the last was step {self._step}{silent}; its main thread is here:\n{stack}"
        )
        print(text, end="", file=sys.stderr, flush=True)
        with self._path.open("a") as file:
            file.write(text)

    def __enter__(self) -> "Watchdog":
        self._since = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._ended.set()
        self._thread.join(LAST_WORDS)  # a report waits for answers; the process does not wait for the report
