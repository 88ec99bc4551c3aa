"""From records to the cells of a table: the best configuration of each setting, its mean and spread over seeds."""

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from experiments.published import Table
from experiments.records import Record


class Best(NamedTuple):
    """The best of the configurations tried on one setting."""

    records: list[Record]  # one per seed
    tried: int  # configurations

    def values(self, score: str) -> list[float]:
        """One per seed; a run that failed scored nothing."""
        return [record.scores.get(score, 0.0) for record in self.records]

    def mean(self, score: str) -> float:
        """Over seeds."""
        return statistics.fmean(self.values(score))


def table_cells(records: Iterable[Record], table: Table) -> dict[tuple[str, str], dict[str, Best]]:
    """(model, column) -> setting -> the best configuration.

    Configurations are compared by the means over their seeds of the scores in `table.best`.
    """
    groups: dict[tuple[str, str, str], dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        configuration = {name: value for name, value in record.options.items() if name != "seeds"}
        key = json.dumps(configuration, sort_keys=True)
        groups[record.model, record.column, record.setting][key].append(record)
    found: dict[tuple[str, str], dict[str, Best]] = defaultdict(dict)
    for (model, column, setting), configurations in groups.items():
        candidates = [Best(sorted(runs, key=_seed), len(configurations)) for runs in configurations.values()]
        best = max(candidates, key=lambda one: [one.mean(score) for score in table.best])
        found[model, column][setting] = best
    return dict(found)


def _seed(record: Record) -> int:
    return record.seed


def columns_of(table: Table, cells: Iterable[tuple[str, str]]) -> list[str]:
    """The columns of the layout, then the further ones, numbers in them in their natural order.

    >>> columns_of(Table("", (), (), columns=("z",)), [("hope", "16 pairs"), ("hope", "4 pairs")])
    ['z', '4 pairs', '16 pairs']
    """

    def natural(text: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]

    return [*table.columns, *sorted({column for _, column in cells} - set(table.columns), key=natural)]


def show(settings: dict[str, Best], table: Table, column: str) -> str:
    """A cell as text: "98.2 ± 0.4 / 10.1 ± 3.0", or "51.2 [3 of 11]" for a mean over some of its settings."""
    text = " / ".join(_show_score(list(settings.values()), score) for score in table.scores)
    expected = table.settings.get(column)
    return text if expected in (None, len(settings)) else f"{text} [{len(settings)} of {expected}]"


def _show_score(bests: Sequence[Best], score: str) -> str:
    mean = statistics.fmean(best.mean(score) for best in bests)
    seeds = min(len(best.records) for best in bests)
    if seeds < 2:
        return f"{100 * mean:.1f}"
    # The spread of the column: of the means over its settings, seed by seed.
    by_seed = [statistics.fmean(best.values(score)[i] for best in bests) for i in range(seeds)]
    return f"{100 * mean:.1f} ± {100 * statistics.stdev(by_seed):.1f}"
