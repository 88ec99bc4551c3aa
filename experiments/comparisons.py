"""What is measured side by side in one process, by the experiments that have no grid of models: a table of numbers."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from experiments.cells import NONE
from experiments.options import command
from experiments.records import commit, write_json
from hope_jax.training.errors import UserError
from hope_jax.training.overrides import one_line
from hope_kernels.benchmarking import machine_line

type Values = Mapping[str, Mapping[str, list[float]]]  # row, column: a number per text, seed, ...


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One experiment's numbers and how they came about.

    Attributes:
      experiment: module below `experiments`; its picture, if any, has the same name.
      title: of the table.
      over: what a cell has several numbers of ("texts").
      values: by row and column; a cell that is not there was not measured, nan: there is no such number.
      machine: processor, jax, Python.
      commit: as in `records.Record`.
      command: computes it again.
    """

    experiment: str
    title: str
    over: str
    values: Values
    machine: str
    commit: str | None
    command: str

    @property
    def columns(self) -> list[str]:
        """Of all rows, in their order."""
        return list(dict.fromkeys(column for row in self.values.values() for column in row))

    def rows(self) -> list[list[str]]:
        """Of the table, each with its name in front.

        >>> Comparison("sleep", "", "texts", {"a": {"x": [1.0, 2.0]}, "b": {"y": [0.5]}}, "", None, "").rows()
        [['a', '1.50 ± 0.707', '–'], ['b', '–', '0.500']]
        """
        return [[name, *(_cell(row.get(column, [])) for column in self.columns)] for name, row in self.values.items()]


def _cell(numbers: list[float]) -> str:
    """Mean and standard deviation, three digits of each."""
    if not numbers or any(map(math.isnan, numbers)):
        return NONE
    shown = [statistics.fmean(numbers), *([statistics.stdev(numbers)] if len(numbers) > 1 else [])]
    return " ± ".join(f"{x:,.0f}" if abs(x) >= 1000 else f"{x:#.3g}".rstrip(".") for x in shown)


def table_of(found: Comparison) -> Table:
    """For the terminal."""
    table = Table("", *found.columns)
    for row in found.rows():
        table.add_row(*row)
    return table


def write_comparison(path: Path, experiment: str, title: str, over: str, values: Values, options: Any) -> Comparison:
    """Writes the numbers with the machine, the commit and the command line of `options`."""
    found = Comparison(experiment, title, over, values, machine_line(), commit(), command(experiment, options))
    write_json(path, dataclasses.asdict(found))
    return found


def read_comparisons(results: Path) -> Iterator[Comparison]:
    """Those of a folder, in the order of their names.

    Raises:
      UserError: a file is not one.
    """
    for path in sorted(results.glob("*.json")):
        try:
            yield Comparison(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is no comparison ({one_line(error)}); remove it and run it again") from error
