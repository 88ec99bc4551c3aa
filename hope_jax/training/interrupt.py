"""Ctrl-C and SIGTERM as requests: the loop finishes its step, saves and stops. A second Ctrl-C stops at once."""

import enum
import os
import signal
import threading
from typing import Any


class Stop(enum.IntEnum):
    """Why a run was asked to stop; among several processes the greatest counts."""

    NO = 0
    INTERRUPTED = 1  # SIGINT, a user
    PREEMPTED = 2  # SIGTERM, the machine will be taken away: a launcher starts the run again


SIGNALS = {signal.SIGINT: Stop.INTERRUPTED, signal.SIGTERM: Stop.PREEMPTED}


class Interruption:
    """While entered, the first SIGINT and every SIGTERM set `requested` instead of ending the process.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self):
        self.requested = Stop.NO
        self._previous: dict[int, Any] = {}

    def _handle(self, signum: int, frame: Any) -> None:
        del frame
        first = self.requested == Stop.NO
        self.requested = max(self.requested, SIGNALS[signal.Signals(signum)])
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, self._previous[signum])
        if first:
            # Not print: the signal may have come in the middle of one.
            again = b"Ctrl-C again stops at once" if signum == signal.SIGINT else b"then leaving (SIGTERM)"
            os.write(2, b"\nhope: finishing this step or evaluation, then saving; " + again + b"\n")

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            # None: a handler that was not installed from Python, and cannot be put back.
            self._previous = {number: signal.signal(number, self._handle) or signal.SIG_DFL for number in SIGNALS}
        return self

    def __exit__(self, *exc: Any) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
