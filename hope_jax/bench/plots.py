"""The benchmark's picture: time against T, K and the tile, and the roofline."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hope_kernels.chips import Chip
from hope_kernels.measuring import Measurement

# Axis label -> points (value, measurement).
type Sweeps = Mapping[str, Sequence[tuple[int, Measurement]]]


def figure(sweeps: Sweeps, rows: Sequence[Measurement], chip: Chip | None) -> Any:
    """A matplotlib figure of one panel per sweep and the roofline of all `rows`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(4.2 * (len(sweeps) + 1), 4), layout="constrained")
    FigureCanvasAgg(drawn)  # draws into memory, whatever display the machine has
    panels = drawn.subplots(1, len(sweeps) + 1, squeeze=False)[0]
    for axes, (label, points) in zip(panels, sweeps.items(), strict=False):
        _sweep(axes, label, points)
    _roofline(panels[-1], rows, chip)
    return drawn


def save(path: Path, sweeps: Sweeps, rows: Sequence[Measurement], chip: Chip | None) -> None:
    """Writes `figure` as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure(sweeps, rows, chip).savefig(path, dpi=120, format="png")


def _sweep(axes: Any, label: str, points: Sequence[tuple[int, Measurement]]) -> None:
    axes.set_xlabel(label)
    if not points:
        return
    names = dict.fromkeys(row.implementation for _, row in points)
    for colour, name in enumerate(names):
        mine = [(value, row) for value, row in points if row.implementation == name]
        values = [value for value, _ in mine]
        axes.plot(values, [row.seconds * 1e3 for _, row in mine], "o-", color=f"C{colour}", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({value for value, _ in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylabel(f"ms, {points[0][1].mode}")
    axes.grid(alpha=0.3)
    axes.legend()


def _roofline(axes: Any, rows: Sequence[Measurement], chip: Chip | None) -> None:
    """Operations per second over operations per byte; the lines are the chip's bounds."""
    names = dict.fromkeys(row.implementation for row in rows)
    for colour, name in enumerate(names):
        for mode, marker in (("forward", "o"), ("forward+gradients", "s")):
            mine = [row for row in rows if (row.implementation, row.mode) == (name, mode)]
            if mine:
                x = [row.flops / row.bytes for row in mine]
                y = [row.flops_per_second / 1e9 for row in mine]
                axes.plot(x, y, marker, color=f"C{colour}", label=f"{name}, {mode}")
    if chip is not None and rows:
        x = [row.flops / row.bytes for row in rows]
        for dtype, peak in chip.flops.items():
            ridge = peak / chip.bandwidth
            line = sorted({min(x) / 2, ridge, max(*x, ridge) * 2})
            axes.plot(line, [min(peak, chip.bandwidth * i) / 1e9 for i in line], "k-", lw=1, alpha=0.6)
            axes.annotate(dtype, (line[-1], peak / 1e9), ha="right", va="bottom", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="GFLOP/s")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
