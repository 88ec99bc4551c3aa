"""From a grid of options to records: each cell is trained, scored and written, unless it has a record."""

import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import optax
from rich.console import Console

from experiments import records
from experiments.options import Options, cells, command, from_command_line, settings
from experiments.records import Record
from experiments.training import Batch, Model, Scores, Trained, percent, say, state_bytes, train
from hope_jax.models import ModelConfig
from hope_jax.training.errors import UserError
from hope_jax.training.overrides import to_dict
from hope_kernels.benchmarking import machine_line


class AnyJob(Protocol):
    """What `compute` asks of a job."""

    @property
    def column(self) -> str: ...  # of the table
    @property
    def setting(self) -> str: ...  # difficulty within the column, "" if there is only one
    @property
    def config(self) -> Any: ...  # of the model, a dataclass
    @property
    def model(self) -> Model: ...
    @property
    def row(self) -> str: ...  # of the table; "": the model's name

    def train(self, label: str, console: Console) -> Trained:
        """Trains and scores; `label` names the run in what is shown."""
        ...


class Job(NamedTuple):
    """What one cell computes: a model trained on a stream of batches."""

    column: str  # of the table
    setting: str  # difficulty within the column, "" if there is only one
    config: Any  # of the model, a dataclass
    model: Model
    batches: Iterator[Batch]
    loss: Callable[[jax.Array, Batch], jax.Array]
    evaluate: Callable[[Any], Scores]
    cell: Options  # the cell, with what the task decides itself (steps, width)
    row: str = ""  # of the table; "": the model's name
    tx: optax.GradientTransformation | None = None  # the optimizer; None: `training.optimizer`
    how: Callable[..., Trained] = train  # it is trained

    def train(self, label: str, console: Console) -> Trained:
        """Trains the model and scores it."""
        parts = (self.model, self.batches, self.loss, self.evaluate, self.cell)
        return self.how(*parts, tx=self.tx, label=label, console=console)


def main[T: Options](experiment: str, options: type[T], tiny: T, prepare: Callable[[T], AnyJob]) -> None:
    """`run` with the options of the command line; a mistake of the user ends it with one line."""
    try:
        run(experiment, from_command_line(options, tiny), prepare)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


def run(experiment: str, options: Options, prepare: Callable[[Any], AnyJob], console: Console | None = None) -> None:
    """Computes every cell of `options` that has no record yet and writes its record.

    Args:
      experiment: module below `experiments`; names the folder of the records.
      options: the grid.
      prepare: one cell -> its `Job`.
      console: where to report; None makes one.

    Raises:
      UserError: the grid is empty, or a cell cannot be built.
    """
    console = console or Console()
    grid = list(cells(options))
    if not grid:
        raise UserError(f"the grid is empty: give every one of {', '.join(options.GRID)} at least one value")
    for number, cell in enumerate(grid, 1):
        name = _label(cell)
        label = f"[{number}/{len(grid)}] {name}"
        path = records.path_of(experiment, name, cell)
        if path.exists() and not options.overwrite:
            say(console, f"{label}: have {path}")
            continue
        began = time.perf_counter()
        record = compute(experiment, cell, prepare(cell), label, console)
        records.write(path, record)
        took = time.perf_counter() - began
        say(console, f"{label}: {record.failed or percent(record.scores)}  ({took:.0f} s)")


def compute(experiment: str, cell: Options, job: AnyJob, label: str, console: Console) -> Record:
    """Trains and scores one cell."""
    [name], [seed] = cell.models, cell.seeds
    trained = job.train(label, console)
    speed = trained.tokens_per_second
    return Record(
        experiment=experiment,
        model=job.row or name,
        column=job.column,
        setting=job.setting,
        seed=seed,
        options=settings(cell),
        config=to_dict(job.config),
        parameters=count(job.model),
        state_bytes=state_bytes(job.config) if isinstance(job.config, ModelConfig) else 0,
        steps=trained.steps,
        seconds=round(trained.seconds, 2),
        cpu_seconds=round(trained.cpu_seconds, 2),
        compile_seconds=round(trained.compile_seconds, 2),
        tokens_per_second=None if speed is None else round(speed),
        scores=trained.scores,
        curve=trained.curve,
        failed=trained.failed,
        machine=machine_line(),
        versions=records.versions(),
        commit=records.commit(),
        command=command(experiment, cell),
    )


def count(model: Model) -> int:
    """How many numbers a model trains."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _label(cell: Options) -> str:
    """The cell's place in the grid, safe as a file name."""
    return "-".join(re.sub(r"[^\w.=]+", "_", str(getattr(cell, name)[0])).strip("_") for name in cell.GRID)
