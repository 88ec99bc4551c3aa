"""The records of a run: RUN/metrics.jsonl, and copies of them for TensorBoard and, if wanted, Weights & Biases."""

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from hope_jax.training.config import TrainConfig
from hope_jax.training.errors import UserError
from hope_jax.training.files import write_text
from hope_jax.training.overrides import one_line, to_dict

METRICS_FILE = "metrics.jsonl"
# What depends on the machine and the clock; every other number of a run is a function of its config and its data.
TIMED = frozenset(
    [
        *("seconds", "tokens_per_second", "step_seconds", "step_seconds_p95", "mfu", "goodput"),
        *("device_memory_bytes", "process_memory_bytes"),
    ]
)


class Sink(Protocol):
    """A place for records."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes one record."""
        ...

    def close(self) -> None:
        """Nothing follows."""
        ...


class JsonLines:
    """One record a line, on the disk at once. Records after `resume_step`, of steps to be repeated, are dropped."""

    def __init__(self, run_dir: Path, resume_step: int):
        path = run_dir / METRICS_FILE
        kept = [record for record in read_metrics(run_dir) if record["step"] <= resume_step]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """RUN/events.*; TensorBoard hides the records after `resume_step`."""

    def __init__(self, run_dir: Path, resume_step: int):
        from tensorboardX import SummaryWriter

        self._events = SummaryWriter(str(run_dir), purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._events.close()


class WeightsAndBiases:
    """A run of a project on wandb.ai, named after the run directory, and the same one again on a resume.

    W&B takes no record twice: it warns of those of repeated steps and keeps the first.

    Raises:
      UserError: the package is not installed, or W&B refuses, for example because nobody is logged in.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, began: float):
        check_wandb(config)
        import wandb  # type: ignore[import-not-found]

        try:
            self._run = wandb.init(
                project=config.wandb,
                name=run_dir.name,
                id=f"{run_dir.name}-{began:.0f}",
                resume="allow",
                dir=str(run_dir),
                config=to_dict(config),
            )
        except Exception as error:  # of its own kinds, of the network, of the disk
            raise UserError(
                f"wandb={config.wandb} could not begin ({one_line(error)}); log in with: wandb login, set "
                "WANDB_MODE=offline to send the records later, or leave out wandb="
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def check_wandb(config: TrainConfig) -> None:
    """Raises:
    UserError: the config wants Weights & Biases, and the package is not installed.
    """
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"wandb={config.wandb} needs the package wandb, which is not installed; "
            "install it with: pip install wandb, or leave out wandb="
        )


class MetricsWriter:
    """Writes records to metrics.jsonl, to TensorBoard and to `others`; use as a context manager.

    A record is a flat dict with a "step"; training and evaluation numbers differ in their keys.

    Args:
      run_dir: an existing directory.
      resume_step: records after this step belong to steps that will be repeated and are dropped.
      others: further places.
    """

    def __init__(self, run_dir: Path, resume_step: int = 0, *others: Sink):
        self._sinks: list[Sink] = [JsonLines(run_dir, resume_step), TensorBoard(run_dir, resume_step), *others]

    def write(self, step: int, **values: float) -> None:
        """Writes one record."""
        for sink in self._sinks:
            sink.write(step, values)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc: Any) -> None:
        for sink in self._sinks:
            sink.close()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The records of a run, in the order of writing; a line cut short by a crash is dropped."""
    path = run_dir / METRICS_FILE
    return list(parse_records(path.read_text() if path.exists() else ""))


def parse_records(text: str) -> list[dict[str, float]]:
    """The records in some lines, up to the first that is not whole."""
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(record, dict) or not math.isfinite(record.get("step", math.nan)):
            break
        records.append(record)
    return records
