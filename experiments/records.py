"""The record of one cell: what was computed, on what, how to compute it again, and what came out."""

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.options import Options, fingerprint
from hope_jax.training.errors import UserError
from hope_jax.training.overrides import one_line

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
SOURCES = ("hope_jax", "kernels", "experiments/*.py")


@dataclasses.dataclass(frozen=True)
class Record:
    """One cell.

    Attributes:
      experiment: module below `experiments`.
      model: row of the table: the model, or the variant of it.
      column: column of the table.
      setting: difficulty setting within the column; a column is the mean over its settings.
      seed: of parameters and training data.
      options: what decides the numbers (`options.settings`).
      config: the model config.
      parameters: how many numbers are trained.
      state_bytes: bytes of recurrent state of one sequence; 0 if the model is not one of the library.
      steps: training steps taken.
      seconds: of training steps after the first.
      cpu_seconds: of processor time in `seconds`, over all cores.
      compile_seconds: of the first step.
      tokens_per_second: of training steps.
      scores: shares between 0 and 1, or bits per byte (`training.in_bits`); empty when the run failed.
      curve: [step, scores] of every evaluation.
      failed: why there are no scores, or None.
      machine: processor, jax, Python.
      versions: of the packages that compute.
      commit: of the working tree; "+" at the end: with changes that are not committed. None: no git.
      command: computes this cell again.
    """

    experiment: str
    model: str
    column: str
    setting: str
    seed: int
    options: dict[str, Any]
    config: dict[str, Any]
    parameters: int
    state_bytes: int
    steps: int
    seconds: float
    cpu_seconds: float
    compile_seconds: float
    tokens_per_second: float | None
    scores: dict[str, float]
    curve: list[tuple[int, dict[str, float]]]
    failed: str | None
    machine: str
    versions: dict[str, str]
    commit: str | None
    command: str


def path_of(experiment: str, label: str, cell: Options) -> Path:
    """Where the record of a cell lies; `label` is for the reader, the fingerprint tells cells apart."""
    return cell.results / experiment / f"{label}-{fingerprint(cell)}.json"


def write(path: Path, record: Record) -> None:
    """The record as JSON; what is not a number has no place in one."""
    write_json(path, dataclasses.asdict(record), allow_nan=False)


def write_json(path: Path, value: Any, *, allow_nan: bool = True) -> None:
    """A value as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1, allow_nan=allow_nan) + "\n")
    partial.replace(path)


def read(path: Path) -> Record:
    """A record that `write` wrote.

    Raises:
      UserError: the file is not a record.
    """
    try:
        return Record(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a record ({one_line(error)}); remove it and run its cell again") from error


def read_all(results: Path) -> Iterator[Record]:
    """The records below a folder, in the order of their paths."""
    for path in sorted(results.glob("*/*.json")):
        yield read(path)


def versions() -> dict[str, str]:
    """Of Python and the packages that compute."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def commit() -> str | None:
    """The commit of the working tree, with "+" if a source file differs from it; None outside git."""
    root = Path(__file__).parent.parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "--porcelain", "--", *SOURCES))
    except (OSError, subprocess.CalledProcessError):
        return None
