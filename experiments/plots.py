"""The report's pictures: bars for every table, and curves where a table has something to be drawn against."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cells import Best, columns_of, scores_of
from experiments.published import AT, ETA, FORGOTTEN, FROM, GAINED, GATE, PREFIXES, TASK, TUNED, WRITTEN, Table
from experiments.training import in_bits

type Cells = Mapping[tuple[str, str], Mapping[str, Best]]


def draw(experiment: str, cells: Cells, table: Table, folder: Path) -> list[Path]:
    """Draws what there is to draw and returns the paths of the PNG files; nothing without records."""
    if not cells:
        return []
    pictures = {"": bars, **CURVES.get(experiment, {})}
    paths = {folder / f"{experiment}{suffix}.png": picture for suffix, picture in pictures.items()}
    return [save(picture(cells, table), path) for path, picture in paths.items()]


def bars(cells: Cells, table: Table) -> Any:
    """One panel per score, one group per column, one bar per model."""
    shown = {score for _, column in cells for score in scores_of(table, cells, column)}
    scores = [score for score in table.scores if score in shown]
    models = sorted({model for model, _ in cells})
    columns = [column for column in columns_of(table, cells) if any((model, column) in cells for model in models)]
    figure, panels = figure_of(len(scores), width=1.5 + max(3, len(columns)))
    for axes, score in zip(panels, scores, strict=True):
        for number, model in enumerate(models):
            heights = {}
            for i, column in enumerate(columns):
                bests = [best for best in cells.get((model, column), {}).values() if best.has(score)]
                if bests:
                    heights[i] = statistics.fmean(best.mean(score) for best in bests) * (1 if in_bits(score) else 100)
            left = [i + 0.8 * number / len(models) for i in heights]
            axes.bar(left, list(heights.values()), 0.8 / len(models), align="edge", label=model)
        axes.set_xticks([i + 0.4 for i in range(len(columns))], columns, rotation=30, ha="right")
        if in_bits(score):
            axes.set(ylabel=score)
        else:
            axes.set(ylabel=f"{score}, percent", ylim=(0, 105))
    panels[-1].legend(fontsize=7)
    return figure


def against_state(cells: Cells, table: Table) -> Any:
    """Accuracy over bytes of recurrent state of one sequence: a panel per number of pairs, a curve per model."""
    [score] = table.scores
    curves: dict[int, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for (model, _), settings in cells.items():
        for best in filter(lambda best: best.has(score), settings.values()):
            [pairs] = best.records[0].options["pairs"]
            curves[pairs][model].append((best.records[0].state_bytes, 100 * best.mean(score)))
    figure, panels = figure_of(len(curves), width=4)
    for axes, (pairs, by_model) in zip(panels, sorted(curves.items()), strict=True):
        for model, points in sorted(by_model.items()):
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=model)
        axes.set_xscale("log", base=2)
        axes.set(title=f"{pairs} pairs", xlabel="bytes of state of one sequence", ylim=(0, 105))
        axes.set_ylabel(f"{score}, percent")
        axes.grid(alpha=0.3)
    panels[-1].legend(fontsize=7)
    return figure


def against_position(cells: Cells, table: Table) -> Any:
    """Bits per byte over the place in the context, a panel per text; the vertical line ends the training length."""
    columns = columns_of(table, cells)
    figure, panels = figure_of(len(columns), width=6)
    for axes, column in zip(panels, columns, strict=True):
        for (model, name), settings in sorted(cells.items()):
            for best in settings.values() if name == column else ():
                scores = [score for score in table.scores if score.startswith(FROM) and best.has(score)]
                begins = [max(1, int(score.removeprefix(FROM))) for score in scores]
                axes.plot(begins, [best.mean(score) for score in scores], "o-", label=model)
                axes.axvline(best.records[0].options["length"], color="grey", linewidth=0.5)
        axes.set_xscale("log", base=2)
        axes.set(title=column, xlabel="bytes of context, at least", ylabel="bits per byte")
        axes.grid(alpha=0.3)
    panels[-1].legend(fontsize=7)
    return figure


def against_steps(cells: Cells, table: Table) -> Any:
    """The score that decides, over steps and over processor time, with the spread of the seeds."""
    score = table.best[0]
    columns = columns_of(table, cells)
    colors = {model: f"C{number}" for number, model in enumerate(sorted({model for model, _ in cells}))}
    figure, panels = figure_of(2 * len(columns), width=5)
    for number, column in enumerate(columns):
        over_steps, over_time = panels[2 * number : 2 * number + 2]
        for (model, name), settings in sorted(cells.items()):
            for best in settings.values() if name == column else ():
                curves = [record.curve for record in best.records if not record.failed]
                steps = [step for step, _ in min(curves, key=len, default=[])]
                if not steps:
                    continue
                values = [[scores[score] for _, scores in curve[: len(steps)]] for curve in curves]
                mean = [statistics.fmean(at) for at in zip(*values, strict=True)]
                spread = [statistics.stdev(at) if len(at) > 1 else 0.0 for at in zip(*values, strict=True)]
                low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
                per_step = statistics.fmean(r.cpu_seconds / max(1, r.steps - 1) for r in best.records)
                for axes, places in ((over_steps, steps), (over_time, [step * per_step for step in steps])):
                    axes.plot(places, mean, label=model, color=colors[model])
                    axes.fill_between(places, low, high, alpha=0.2, color=colors[model])
        over_steps.set(title=column, xlabel="step", ylabel=score)
        over_time.set(title=column, xlabel="processor seconds of steps", ylabel=score)
        over_time.legend(fontsize=7)
    return figure


def against_width(cells: Cells, table: Table) -> Any:
    """Bits and recall over the share of a representation that is kept, with the spread of the seeds."""
    columns = [(kind, column) for column in columns_of(table, cells) for kind in ("bits", "recall")]
    figure, panels = figure_of(len(columns), width=5)
    for axes, (kind, column) in zip(panels, columns, strict=True):
        for (model, name), settings in sorted(cells.items()):
            for best in settings.values() if name == column else ():
                found = [best.values(f"{kind}_{share}") for share in PREFIXES]
                values = [list(by_seed.values()) for by_seed in found if by_seed]
                spread = [statistics.stdev(seeds) if len(seeds) > 1 else 0.0 for seeds in values]
                shares = PREFIXES[: len(values)]
                axes.errorbar(shares, list(map(statistics.fmean, values)), spread, fmt="o-", capsize=3, label=model)
        axes.set(title=column, xlabel="share of the width", ylabel="bits per byte" if kind == "bits" else "recall at 1")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    return figure


def against_rate(cells: Cells, table: Table) -> Any:
    """Bits over the inner learning rate, and over the share of chunks written; two panels per column.

    A dashed line is the frozen model; in the second panel it is the point at 0, and learning at the gates' rate that at
    100 percent.
    """
    columns = columns_of(table, cells)
    figure, panels = figure_of(2 * len(columns), width=4)
    for number, column in enumerate(columns):
        over_rate, over_share = panels[2 * number : 2 * number + 2]
        rows = sorted(
            (model, best) for (model, name), bests in cells.items() if name == column for best in bests.values()
        )
        for color, (model, best) in enumerate(rows):
            bits = {score: best.mean(score) for score in best.records[0].scores}
            rates = sorted((float(score.removeprefix(ETA)), bits[score]) for score in bits if score.startswith(ETA))
            if not bits:  # the first seed failed
                continue
            over_rate.axhline(bits["bits_frozen"], color=f"C{color}", linestyle="--", label=None if rates else model)
            if rates:
                over_rate.plot(*zip(*rates, strict=True), "o-", color=f"C{color}", label=model)
            shares = {"never": (0.0, bits["bits_frozen"])}
            if (always := f"{ETA}{best.records[0].options.get('eta', 0):g}") in bits:
                shares["always"] = (100.0, bits[always])
            for gate in (score.removeprefix(GATE) for score in bits if score.startswith(GATE)):
                shares[gate] = (100 * bits[WRITTEN + gate], bits[GATE + gate])
            over_share.plot(*zip(*shares.values(), strict=True), "o", color=f"C{color}", label=model)
            for name, point in shares.items():
                over_share.annotate(name.replace("_", " "), point, fontsize=6)
        over_rate.set(title=column, xlabel="inner learning rate", ylabel="bits per byte, second half", xscale="log")
        over_share.set(title=column, xlabel="chunks written, percent", ylabel="bits per byte, second half")
        over_rate.legend(fontsize=7)
    return figure


def matrix(cells: Cells, table: Table) -> Any:
    """Bits, training chunk by serving chunk: for each column and model a panel, and one after the short training."""
    found: dict[tuple[str, str], dict[int, Best]] = defaultdict(dict)
    for (_, column), bests in cells.items():
        for best in bests.values():
            first = best.records[0]
            if first.scores:  # it did not fail
                found[column, first.model.partition(",")[0]][first.options["chunks"][0]] = best
    del table
    figure, panels = figure_of(2 * len(found), width=4)
    for number, ((column, model), by_chunk) in enumerate(sorted(found.items())):
        trained = sorted(by_chunk)
        served = sorted(
            {int(s.removeprefix(AT)) for one in by_chunk.values() for s in one.records[0].scores if s.startswith(AT)}
        )
        tables = {kind: [[by_chunk[t].mean(f"{kind}{s}") for s in served] for t in trained] for kind in (AT, TUNED)}
        low, high = (choose(list(tables.values())) for choose in (np.nanmin, np.nanmax))
        for axes, (kind, rows) in zip(panels[2 * number : 2 * number + 2], tables.items(), strict=True):
            axes.imshow(rows, cmap="viridis_r", vmin=low, vmax=high)
            for y, row in enumerate(rows):
                for x, bits in enumerate(row):
                    axes.text(
                        x, y, f"{bits:.2f}", ha="center", va="center", color="white" if bits > (low + high) / 2 else "k"
                    )
            axes.set_xticks(range(len(served)), served)
            axes.set_yticks(range(len(trained)), trained)
            after = "" if kind == AT else ", after a short training there"
            axes.set(title=f"{model}, {column}{after}", xlabel="chunk in use", ylabel="chunk in training")
    return figure


def against_clock(cells: Cells, table: Table) -> Any:
    """The score that decides over the slowest clock, a panel per column, a curve per number of levels."""
    columns = columns_of(table, cells)
    figure, panels = figure_of(len(columns), width=4)
    for axes, column in zip(panels, columns, strict=True):
        curves: dict[int, list[tuple[int, float]]] = defaultdict(list)
        for (model, name), bests in cells.items():
            for best in bests.values() if name == column else ():
                clocks = best.records[0].options["clocks"][0].split("-")
                percent = 100 * best.mean(table.best[0])
                if not best.records[0].options["eta"]:
                    axes.axhline(percent, linestyle=":", color="grey", label=model)
                elif clocks == ["none"]:
                    axes.axhline(percent, color="grey", label="1 level")
                else:
                    curves[len(clocks) + 1].append((int(clocks[-1]), percent))
        for levels, points in sorted(curves.items()):
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=f"{levels} levels")
        axes.set_xscale("log", base=2)
        axes.set(title=column, xlabel="slowest clock, bytes", ylabel=f"{table.best[0]}, percent", ylim=(0, 105))
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    return figure


def against_gain(cells: Cells, table: Table) -> Any:
    """Forgetting over gain, a panel per sequence of texts, a curve per learner through its inner learning rates.

    Rates that lost on the second text are outside.
    """
    columns = columns_of(table, cells)
    figure, panels = figure_of(len(columns), width=7)
    for axes, column in zip(panels, columns, strict=True):
        for (model, name), settings in sorted(cells.items()):
            for best in settings.values() if name == column else ():
                rates = [score.removeprefix(GAINED) for score in best.records[0].scores if score.startswith(GAINED)]
                rates = [rate for rate in rates if best.mean(GAINED + rate) >= 0]
                x, y = ([best.mean(score + rate) for rate in rates] for score in (GAINED, FORGOTTEN))
                axes.plot(x, y, "o-", label=model)
        axes.axhline(0, color="grey", linewidth=0.5)
        axes.set(title=column, xlabel="gained on the second, bits per byte", ylabel="forgotten of the first")
        axes.grid(alpha=0.3)
    panels[-1].legend(fontsize=7)
    return figure


def with_spread(cells: Cells, table: Table) -> Any:
    """A panel per score, a group of points per column, one for each model, with the spread of the seeds."""
    models = sorted({model for model, _ in cells})
    columns = [column for column in columns_of(table, cells) if any((model, column) in cells for model in models)]
    figure, panels = figure_of(len(table.scores), width=2.0 + 2.0 * len(columns))
    for axes, score in zip(panels, table.scores, strict=True):
        for number, model in enumerate(models):
            found = [(i, cells[model, c][""]) for i, c in enumerate(columns) if (model, c) in cells]
            values = [(i, list(best.values(score).values())) for i, best in found if best.has(score)]
            points = [(i + 0.9 * number / len(models), by_seed) for i, by_seed in values]
            places, means = [at for at, _ in points], [100 * statistics.fmean(values) for _, values in points]
            spread = [100 * statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
            axes.errorbar(places, means, spread, fmt="os^vDP*"[number % 7], capsize=2, label=model)
        axes.set_xticks([i + 0.4 for i in range(len(columns))], columns)
        axes.set(ylabel=f"{score}, percent", ylim=(-5, 105))
        axes.grid(alpha=0.3)
    panels[-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def matrices(cells: Cells, table: Table) -> Any:
    """Accuracy on each task (across) after each task (down), mean over seeds: a row per column, a panel per model."""
    models = sorted({model for (model, _), settings in cells.items() if len(_matrix(settings[""])) > 1})
    columns = [column for column in columns_of(table, cells) if any((model, column) in cells for model in models)]
    figure, panels = figure_of(max(1, len(models)), width=2.2, rows=max(1, len(columns)))
    for place, axes in enumerate(panels):
        axes.set_axis_off()
        if not models or (cell := (models[place % len(models)], columns[place // len(models)])) not in cells:
            continue
        axes.set_axis_on()
        image = axes.imshow(100 * _matrix(cells[cell][""]), vmin=0, vmax=100)
        axes.set_title(f"{cell[1]}\n{cell[0]}", fontsize=7)
        axes.tick_params(labelsize=6)
        if place == 0:
            axes.set(xlabel="on task", ylabel="after task")
            figure.colorbar(image, ax=panels, label="accuracy, percent", shrink=0.6)
    return figure


def _matrix(best: Best) -> np.ndarray:
    """[after task, on task], not a number where a task had not come; the mean over the seeds that did not fail."""
    curves = [record.curve for record in best.records if not record.failed]
    found = np.full((len(curves), *([max(map(len, curves), default=0)] * 2)), np.nan)
    for seed, curve in enumerate(curves):
        for after, (_, scores) in enumerate(curve):
            shares = [share for name, share in scores.items() if name.startswith(TASK)]
            if len(shares) <= len(curve):
                found[seed, after, : len(shares)] = shares
    return found.mean(axis=0) if curves else np.zeros((0, 0))


CURVES = {"class_incremental": {"_spread": with_spread, "_matrix": matrices}}
CURVES |= {"mqar": {"_state": against_state}, "context_use": {"_curve": against_position}}
CURVES |= {"matryoshka": {"_width": against_width}}
CURVES |= {name: {"_curve": against_gain} for name in ("domain_stream", "languages", "translation")}
CURVES |= {name: {"_curve": against_steps} for name in ("optimizer_lm", "optimizer_vision")}
CURVES |= {"test_time_learning": {"_curve": against_rate}, "chunk_transfer": {"_matrix": matrix}}
CURVES |= {"levels_and_frequency": {"_curve": against_clock}}


def save(figure: Any, path: Path) -> Path:
    """Writes a figure as PNG, into a folder that it makes, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def figure_of(panels: int, *, width: float, rows: int = 1) -> tuple[Any, Sequence[Any]]:
    """A figure with this many panels in each row, each `width` inches wide, drawn in memory; its panels row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, 4 if rows == 1 else (width + 0.4) * rows), layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory, whatever display the machine has
    return figure, figure.subplots(rows, panels, squeeze=False).ravel().tolist()
