"""RESULTS.md and the plots, from the records alone.

    python -m experiments.report

Every number comes from a record below experiments/results or from `published`; a cell without a record is an en dash.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments import equal_gain, plots
from experiments.cells import NONE, Best, columns_of, scores_of, show, table_cells
from experiments.comparisons import Comparison, read_comparisons
from experiments.options import RESULTS
from experiments.published import TABLES, Table
from experiments.records import Record, read_all
from hope_jax.training.errors import UserError

HEAD = """# Results

Written by `python -m experiments.report` from the records in `results/`; numbers with "published" are those of the
source named under the table. ± is the standard deviation over seeds. "–": not computed. Scores named "bits" are bits
per byte or per label, fewer are better; all others are percent. Of several configurations the best of those with the
most seeds is shown. A run that was not finite is in no mean; the cell counts it. Of sections that name what they are
over, the columns name the units, shares are between 0 and 1, and ± is over what they name.
"""


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Where the report reads and writes.

    Attributes:
      results: folder of the records.
      out: folder of RESULTS.md and plots/.
    """

    results: Path = RESULTS
    out: Path = Path("experiments")


def report(options: ReportOptions) -> Path:
    """Writes RESULTS.md and the plots.

    Returns:
      The path of RESULTS.md.
    """
    by_experiment: dict[str, list[Record]] = {name: [] for name in TABLES}
    for record in read_all(options.results):
        by_experiment.setdefault(record.experiment, []).append(record)
    machines = list(dict.fromkeys(record.machine for found in by_experiment.values() for record in found))
    parts = [HEAD, *(_section(name, found, machines, options.out) for name, found in by_experiment.items())]
    parts += [_comparison(found, options.out) for found in read_comparisons(options.results)]
    if machines:
        parts.append("## Machines\n\n" + "\n".join(f"- M{i}: {line}" for i, line in enumerate(machines, 1)) + "\n")
    path = options.out / "RESULTS.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts))
    return path


def layout(experiment: str, records: Sequence[Record]) -> Table:
    """The table of an experiment; one without an entry in `published` shows all of its scores."""
    if experiment in TABLES:
        return TABLES[experiment]
    scores = tuple(dict.fromkeys(score for record in records for score in record.scores))
    return Table(experiment.replace("_", " "), scores, scores)


def _section(experiment: str, records: Sequence[Record], machines: Sequence[str], out: Path) -> str:
    table = layout(experiment, records)
    cells = table_cells(records, table)
    lines = [f"## {table.title}", "", *_table(table, cells), ""]
    if table.source:
        lines += [f"Published: {table.source}.", ""]
    if table.note:
        lines += [table.note, ""]
    if equal := equal_gain.rows(cells):
        head = ["model", "column", *(f"gained {gain:g}" for gain in equal_gain.GAINS)]
        lines += ["Forgotten where as much was gained, bits per byte, between rates on straight lines:", ""]
        lines += [*markdown(head, equal), ""]
    lines += [
        f"![{experiment}]({path.relative_to(out)})" for path in plots.draw(experiment, cells, table, out / "plots")
    ]
    return "\n".join([*lines, "", *_details(cells, machines), ""])


def _comparison(found: Comparison, out: Path) -> str:
    """A section of numbers that were measured side by side."""
    lines = [f"## {found.title}", "", *markdown(["", *found.columns], found.rows()), ""]
    lines += [f"Over {found.over}. {found.machine}; {found.commit or 'no commit'}; `{found.command}`", ""]
    picture = out / "plots" / f"{found.experiment}.png"
    return "\n".join([*lines, f"![{found.experiment}]({picture.relative_to(out)})\n"] if picture.exists() else lines)


def _table(table: Table, cells: dict[tuple[str, str], dict[str, Best]]) -> list[str]:
    """One row per model, and one below it with the published numbers where there are any."""
    columns = columns_of(table, cells)
    tables = {column: table._replace(scores=scores_of(table, cells, column)) for column in columns}
    rows = []
    for model in dict.fromkeys([*table.published, *sorted({model for model, _ in cells})]):
        ours = [show(cells[model, c], tables[c], c) if (model, c) in cells else NONE for c in columns]
        rows.append([model, *ours])
        if model in table.published:
            rows.append([f"{model}, published", *(table.published[model].get(column, NONE) for column in columns)])
    return markdown(["model", *columns], rows)


def _details(cells: dict[tuple[str, str], dict[str, Best]], machines: Sequence[str]) -> list[str]:
    """How each number was made."""
    head = ["model", "column", "setting", "seeds", "configurations tried", "parameters", "steps", "CPU min"]
    head += ["CPU ms a step", "commit"]
    rows = []
    for (model, column), settings in sorted(cells.items()):
        for setting, best in sorted(settings.items()):
            first = best.records[0]
            made = [model, column, setting or NONE, _seeds(best), str(best.tried), f"{first.parameters:,}"]
            seconds = sum(record.cpu_seconds for record in best.records)  # the first step of each is not in it
            per_step = 1000 * seconds / max(1, sum(record.steps - 1 for record in best.records))
            minutes = seconds / len(best.records) / 60
            made += ["-".join(_range(record.steps for record in best.records)), f"{minutes:.1f}"]
            made += [f"{per_step:.1f}", _once(record.commit or NONE for record in best.records)]
            made += [_once(f"M{machines.index(record.machine) + 1}" for record in best.records)]
            rows.append([*made, f"`{_command(best)}`"])
    return markdown([*head, "machine", "command"], rows) if rows else ["No records yet."]


def _once(words: Iterable[str]) -> str:
    """ "M1 M2": each once, in their order."""
    return " ".join(dict.fromkeys(words))


def _command(best: Best) -> str:
    """That of the first seed, with all of them."""
    command = best.records[0].command
    if len(best.records) == 1:
        return command
    return f"{re.sub(r' --seeds [0-9]+', '', command)} --seeds {' '.join(str(record.seed) for record in best.records)}"


def _seeds(best: Best) -> str:
    """ "0 1 2", with what became of those that failed."""
    return " ".join(str(r.seed) + (f" ({r.failed})" if r.failed else "") for r in best.records)


def _range(values: Iterable[int]) -> list[str]:
    """Least and greatest, once if they are the same."""
    sorted_values = sorted(values)
    return [str(value) for value in dict.fromkeys([sorted_values[0], sorted_values[-1]])]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table; bars inside cells are escaped.

    >>> markdown(["a", "b"], [["1", "x|y"]])
    ['| a | b |', '|---|---|', '| 1 | x\\\\|y |']
    """

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


if __name__ == "__main__":
    import tyro

    try:
        print(report(tyro.cli(ReportOptions)))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
