"""Ctrl-C as a request: the loop finishes its step, saves and stops. A second Ctrl-C stops at once."""

import os
import signal
import threading
from typing import Any


class Interruption:
    """While entered, the first SIGINT sets `requested` instead of raising.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self):
        self.requested = False
        self._previous: Any = None

    def _handle(self, signum: int, frame: Any) -> None:
        del signum, frame
        self.requested = True
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nhope: finishing this step or evaluation, then saving; Ctrl-C again stops at once\n")
        signal.signal(signal.SIGINT, self._previous)

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
