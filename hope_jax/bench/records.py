"""Runs of the benchmark as files, and the comparison of two."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hope_jax.training.errors import UserError
from hope_jax.training.overrides import one_line
from hope_kernels.benchmarking import machine_line
from hope_kernels.chips import Chip
from hope_kernels.measuring import Measurement


class Run(NamedTuple):
    """What one call of the benchmark measured, and on what."""

    machine: str
    chip: Chip | None
    load: float | None  # the machine's load average when the run ended; None where there is none to read
    command: str
    measurements: list[Measurement]


def run_of(measurements: Sequence[Measurement], chip: Chip | None, command: str) -> Run:
    """The measurements with the machine and its load as they are now."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return Run(machine_line(), chip, load, command, list(measurements))


def write_run(path: Path, run: Run) -> None:
    """The run as JSON.

    Raises:
      UserError: the file cannot be written.
    """
    record = run._replace(
        chip=None if run.chip is None else run.chip._asdict(),  # type: ignore[arg-type]
        measurements=[row._asdict() for row in run.measurements],  # type: ignore[arg-type]
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record._asdict(), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def read_run(path: Path) -> Run:
    """A run that `write_run` wrote.

    Raises:
      UserError: there is no such file, or it is not a run of the benchmark.
    """
    try:
        record = json.loads(path.read_text())
        chip = None if record["chip"] is None else Chip(**record["chip"])
        rows = [Measurement(**row) for row in record["measurements"]]
        return Run(record["machine"], chip, record["load"], record["command"], rows)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        reason = one_line(error)
        raise UserError(f"{path} is not a run of this benchmark ({reason}); write one with --json {path}") from error


def times_faster(now: Run, former: Run) -> dict[tuple[str, str, str, str], float]:
    """By row that both runs have: the former median over the present one."""
    before = {row.key: row.seconds for row in former.measurements}
    return {row.key: before[row.key] / row.seconds for row in now.measurements if row.key in before}


def caution(now: Run, former: Run) -> str | None:
    """What makes the ratios of two runs something else than a change of the program."""
    if now.machine != former.machine:
        return f"the machines differ, so the ratios compare them too: then {former.machine}; now {now.machine}"
    return None
