"""From records to the cells of a table: the best configuration of each setting, its mean and spread over seeds."""

import json
import math
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

    def values(self, score: str) -> dict[int, float]:
        """By seed, where this was measured: a run that failed has no scores, and a model need not have every one."""
        return {record.seed: record.scores[score] for record in self.records if score in record.scores}

    def mean(self, score: str) -> float:
        """Over the seeds that have it; nan: none has."""
        return statistics.fmean(self.values(score).values()) if self.has(score) else math.nan

    def has(self, score: str) -> bool:
        """Whether this was measured."""
        return bool(self.values(score))

    def rank(self, scores: Sequence[str]) -> list[float]:
        """Numbers of which greater ones are better: how many seeds have scores, then the means of these scores.

        A run that failed knows nothing here: it may not be left out where configurations are compared.
        """

        def of(record: Record, score: str) -> float:
            bits = in_bits(score)
            return record.scores.get(score, RAW_BITS if bits else 0.0) * (-1 if bits else 1)

        return [
            sum(record.failed is None for record in self.records),
            *(statistics.fmean(of(record, score) for record in self.records) for score in scores),
        ]


def table_cells(records: Iterable[Record], table: Table) -> dict[tuple[str, str], dict[str, Best]]:
    """(model, column) -> setting -> the best configuration.

    Of those with the most seeds, so that no lucky one counts; they are compared by their means of the scores in
    `table.best`.
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

    Runs that failed are in no mean and are counted: "51.2 [1 of 3 runs not finite]".
    """
    runs = [record for best in settings.values() for record in best.records]
    failed = sum(record.failed is not None for record in runs)
    if failed == len(runs):
        return FAILED
    text = " / ".join(_show_score(list(settings.values()), score) for score in table.scores)
    expected = table.settings.get(column)
    known = sum(any(record.failed is None for record in best.records) for best in settings.values())
    notes = [] if expected in (None, known) else [f"{known} of {expected}"]
    notes += [f"{failed} of {len(runs)} runs {FAILED}"] * (failed > 0)
    return f"{text} [{', '.join(notes)}]" if notes else text


def _show_score(bests: Sequence[Best], score: str) -> str:
    found = [best.values(score) for best in bests if best.has(score)]
    if not found:
        return NONE
    mean = show_score(score, statistics.fmean(statistics.fmean(values.values()) for values in found))
    seeds = set(found[0]).intersection(*found)
    if len(seeds) < 2:
        return mean
    # The spread of the column: of the means over its settings, seed by seed.
    by_seed = [statistics.fmean(values[seed] for values in found) for seed in sorted(seeds)]
    return f"{mean} ± {show_score(score, statistics.stdev(by_seed))}"
