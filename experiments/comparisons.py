"""What is measured side by side in one process, by the experiments that have no grid of models: a table of numbers."""

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
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
      over: what a cell has its numbers of ("3 texts").
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
        [['a', '1.50 ± 0.71', '–'], ['b', '–', '0.5000']]
        """
        return [[name, *(_cell(row.get(column, [])) for column in self.columns)] for name, row in self.values.items()]


def _cell(numbers: list[float]) -> str:
    """Mean and standard deviation of those that are numbers; the deviation has two digits, a number alone four.

    >>> _cell([2.2213, 2.2612]), _cell([1234.5678]), _cell([0.5, math.nan]), _cell([math.nan]), _cell([])
    ('2.241 ± 0.028', '1235', '0.5000 [1 of 2]', 'no number', '–')
    """
    known = [x for x in numbers if not math.isnan(x)]
    if not known:
        return "no number" if numbers else NONE
    mean, spread = statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0
    digits = (
        max(0, 1 - math.floor(math.log10(spread))) if spread else max(0, 3 - math.floor(math.log10(abs(mean) or 1)))
    )
    shown = f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(known) > 1 else "")
    return shown + (f" [{len(known)} of {len(numbers)}]" if len(known) < len(numbers) else "")


def table_of(found: Comparison) -> Table:
    """For the terminal."""
    table = Table("", *found.columns)
    for row in found.rows():
        table.add_row(*row)
    return table


def write_comparison(experiment: str, title: str, over: str, values: Values, options: Any) -> Comparison:
    """Writes the numbers to `options.results` with the machine, the commit and the command line of `options`."""
    words = command(experiment, options) + (" --tiny" if options.tiny else "")
    found = Comparison(experiment, title, over, values, machine_line(), commit(), words)
    as_json = _each(values, lambda x: None if math.isnan(x) else x)
    write_json(options.results, dataclasses.asdict(found) | {"values": as_json}, allow_nan=False)
    return found


def _each(values: Any, change: Callable[[Any], Any]) -> dict[str, dict[str, list[Any]]]:
    return {
        name: {column: list(map(change, numbers)) for column, numbers in row.items()} for name, row in values.items()
    }


def read_comparisons(results: Path) -> Iterator[Comparison]:
    """Those of a folder, in the order of their names.

    Raises:
      UserError: a file is not one.
    """
    for path in sorted(results.glob("*.json")):
        try:
            found = Comparison(**json.loads(path.read_text()))
            yield dataclasses.replace(found, values=_each(found.values, lambda x: math.nan if x is None else x))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no comparison ({one_line(error)}); remove it and run it again") from error
