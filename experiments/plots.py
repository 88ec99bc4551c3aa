"""The report's pictures: bars for every table, and accuracy against state size for associative recall."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.cells import Best, columns_of
from experiments.published import Table

type Cells = Mapping[tuple[str, str], Mapping[str, Best]]


def draw(experiment: str, cells: Cells, table: Table, folder: Path) -> list[Path]:
    """Draws what there is to draw and returns the paths of the PNG files; nothing without records."""
    if not cells:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"": bars, "_state": against_state} if experiment == "mqar" else {"": bars}
    paths = {folder / f"{experiment}{suffix}.png": picture for suffix, picture in pictures.items()}
    for path, picture in paths.items():
        picture(cells, table).savefig(path, dpi=120)
    return list(paths)


def bars(cells: Cells, table: Table) -> Any:
    """One panel per score, one group per column, one bar per model."""
    models = sorted({model for model, _ in cells})
    columns = [column for column in columns_of(table, cells) if any((model, column) in cells for model in models)]
    figure, panels = _figure(len(table.scores), width=1.5 + len(columns))
    for axes, score in zip(panels, table.scores, strict=True):
        for number, model in enumerate(models):
            mine = {i: cells[model, column] for i, column in enumerate(columns) if (model, column) in cells}
            heights = [100 * statistics.fmean(best.mean(score) for best in bests.values()) for bests in mine.values()]
            left = [i + 0.8 * number / len(models) for i in mine]
            axes.bar(left, heights, 0.8 / len(models), align="edge", label=model)
        axes.set_xticks([i + 0.4 for i in range(len(columns))], columns, rotation=30, ha="right")
        axes.set(ylabel=f"{score}, percent", ylim=(0, 105))
    panels[-1].legend(fontsize=7)
    return figure


def against_state(cells: Cells, table: Table) -> Any:
    """Accuracy over bytes of recurrent state of one sequence: a panel per number of pairs, a curve per model."""
    [score] = table.scores
    curves: dict[int, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for (model, _), settings in cells.items():
        for best in settings.values():
            [pairs] = best.records[0].options["pairs"]
            curves[pairs][model].append((best.records[0].state_bytes, 100 * best.mean(score)))
    figure, panels = _figure(len(curves), width=4)
    for axes, (pairs, by_model) in zip(panels, sorted(curves.items()), strict=True):
        for model, points in sorted(by_model.items()):
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=model)
        axes.set_xscale("log", base=2)
        axes.set(title=f"{pairs} pairs", xlabel="bytes of state of one sequence", ylim=(0, 105))
        axes.set_ylabel(f"{score}, percent")
        axes.grid(alpha=0.3)
    panels[-1].legend(fontsize=7)
    return figure


def _figure(panels: int, *, width: float) -> tuple[Any, Sequence[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, 4), layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory, whatever display the machine has
    return figure, figure.subplots(1, panels, squeeze=False)[0]
