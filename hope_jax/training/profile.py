"""`hope train ... --profile 10:13`: a trace of some steps in RUN/profile, for xprof.

Look at it with `tensorboard --logdir RUN` (with the plugin `pip install xprof`), or `xprof RUN/profile`.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hope_jax.training.errors import UserError
from hope_jax.training.goodput import Clock

PROFILE = "profile"


class Steps(NamedTuple):
    """The first and the last step of a trace, counted from 1 as everywhere."""

    first: int
    last: int


def parse_steps(text: str) -> Steps:
    """Reads "10:13".

    >>> parse_steps("10:13")
    Steps(first=10, last=13)

    Raises:
      UserError: that is not two steps, in order.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if found is None:
        raise UserError(f"--profile {text}: give the first and the last step, for example --profile 10:13")
    steps = Steps(int(found[1]), int(found[2]))
    if not 1 <= steps.first <= steps.last:
        raise UserError(f"--profile {text}: steps count from 1 and the last is not before the first; try 10:13")
    return steps


def check_steps(steps: Steps, start: int, end: int) -> None:
    """Refuses a trace of steps that a run does not take.

    Args:
      steps: of the trace.
      start, end: the run takes steps start + 1 to end.
    Raises:
      UserError: a step lies outside.
    """
    if start == end:
        raise UserError(f"--profile {steps.first}:{steps.last}: the run is at step {end} already; give a larger steps")
    if not start < steps.first <= steps.last <= end:
        raise UserError(
            f"--profile {steps.first}:{steps.last}: this run takes steps {start + 1} to {end}; "
            f"for example --profile {max(end - 3, start + 1)}:{end}"
        )


class Profile:
    """Traces steps; use as a context manager, in which a trace that is interrupted is kept.

    Args:
      run_dir: the trace goes to RUN/profile.
      steps: None for no trace.
      clock: the time that a trace takes is no time of steps.
    """

    def __init__(self, run_dir: Path, steps: Steps | None, clock: Clock):
        self._directory, self._steps, self._clock = run_dir / PROFILE, steps, clock
        self.running = False

    def begins(self, step: int, state: Any) -> bool:
        """Starts the trace if this is its first step; waits for what the device still does for the steps before."""
        if self._steps is None or step != self._steps.first:
            return False
        jax.block_until_ready(state)
        with self._clock.doing("other"):
            jax.profiler.start_trace(self._directory)
        self.running = True
        return True

    def ends(self, step: int, state: Any) -> bool:
        """Writes the trace if this was its last step; waits for the device."""
        if self._steps is None or step != self._steps.last:
            return False
        jax.block_until_ready(state)
        self._stop()
        return True

    def step(self, step: int) -> Any:
        """A context that marks a step in the trace."""
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def _stop(self) -> None:
        if self.running:
            with self._clock.doing("other"):
                jax.profiler.stop_trace()
        self.running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stop()
