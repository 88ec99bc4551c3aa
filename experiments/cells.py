"""From records to the cells of a table: the best configuration of each setting, its mean and spread over seeds."""

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from experiments.published import Table
from experiments.records import Record
from experiments.training import in_bits, show_score

NONE = "–"
FAILED = "not finite"  # the only way in which a run fails
RAW_BITS = 8.0  # of a byte of which nothing is known


def capped(bits: float) -> float:
    """Bits per byte no worse than those of a model that knows nothing; what is not a number knows nothing.

    >>> capped(2.5), capped(9.0), capped(float("nan"))
    (2.5, 8.0, 8.0)
    """
    return bits if bits < RAW_BITS else RAW_BITS


def mean_and_spread(values: Sequence[float], digits: int = 3) -> str:
    """The mean, and the standard deviation where there is more than one.

    >>> mean_and_spread([1.0, 2.0]), mean_and_spread([0.5], 1)
    ('1.500 ± 0.707', '0.5')
    """
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


class Best(NamedTuple):
    """The best of the configurations tried on one setting."""

    records: list[Record]  # one per seed
    tried: int  # configurations

    def values(self, score: str) -> list[float]:
        """One per seed; a run that failed knows nothing."""
        return [record.scores.get(score, RAW_BITS if in_bits(score) else 0.0) for record in self.records]

    def mean(self, score: str) -> float:
        """Over seeds."""
        return statistics.fmean(self.values(score))

    def has(self, score: str) -> bool:
        """Whether this was measured: a model need not have every score."""
        return any(score in record.scores or record.failed for record in self.records)

    def rank(self, scores: Sequence[str]) -> list[float]:
        """The means of these scores as numbers of which greater ones are better."""
        return [-self.mean(score) if in_bits(score) else self.mean(score) for score in scores]


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
        best = max(candidates, key=lambda one: one.rank(table.best))
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


def scores_of(table: Table, cells: Mapping[tuple[str, str], Mapping[str, Best]], column: str) -> tuple[str, ...]:
    """The scores of the table that any row has in a column; all of them while every run there failed."""
    found = {
        score
        for (_, name), settings in cells.items()
        if name == column
        for best in settings.values()
        for record in best.records
        for score in record.scores
    }
    return tuple(score for score in table.scores if score in found) or table.scores


def show(settings: dict[str, Best], table: Table, column: str) -> str:
    """A cell as text: "98.2 ± 0.4 / 10.1 ± 3.0", or "51.2 [3 of 11]" for a mean over some of its settings.

    Where every run failed there is no number.
    """
    if all(record.failed for best in settings.values() for record in best.records):
        return FAILED
    text = " / ".join(_show_score(list(settings.values()), score) for score in table.scores)
    expected = table.settings.get(column)
    return text if expected in (None, len(settings)) else f"{text} [{len(settings)} of {expected}]"


def _show_score(bests: Sequence[Best], score: str) -> str:
    bests = [best for best in bests if best.has(score)]
    if not bests:
        return NONE
    mean = show_score(score, statistics.fmean(best.mean(score) for best in bests))
    seeds = min(len(best.records) for best in bests)
    if seeds < 2:
        return mean
    # The spread of the column: of the means over its settings, seed by seed.
    by_seed = [statistics.fmean(best.values(score)[i] for best in bests) for i in range(seeds)]
    return f"{mean} ± {show_score(score, statistics.stdev(by_seed))}"
