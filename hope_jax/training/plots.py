"""Pictures of runs: RUN/loss.png, and `hope plot RUN... --out FILE.png`."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hope_jax.training.config import read_config
from hope_jax.training.errors import UserError
from hope_jax.training.level_health import ratios
from hope_jax.training.metrics import METRICS_FILE, read_metrics
from hope_jax.training.telemetry import GRADIENT_RATIO

AXES = {"steps": "step", "tokens": "tokens", "time": "hours of machine time"}
SMOOTHED = 50  # the line of the training loss is a mean over one part in so many of its points

Record = Mapping[str, float]


def plot_loss(run_dirs: Mapping[str, Path], path: Path, x: str = "steps") -> None:
    """Draws training and validation bits per byte, one colour per run.

    Args:
      run_dirs: by label.
      path: of the picture; its ending says which kind.
      x: "steps", "tokens", or "time": of all processes of the run, compilation, evaluations and saves included and
        the gaps between them left out.
    Raises:
      UserError: the records of a run have no times.
    """
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    for number, (label, run_dir) in enumerate(run_dirs.items()):
        records, position = read_metrics(run_dir), _position(run_dir, x)
        colour = f"C{number}"
        at, losses = _points(records, "bits_per_byte", position)
        if at.size:
            axes.plot(at, losses, alpha=0.25, color=colour, linewidth=1)
            axes.plot(*smooth(at, losses), color=colour, label=f"{label} training")
        at, losses = _points(records, "validation_bits_per_byte", position)
        if at.size:
            axes.plot(at, losses, "o--", color=colour, label=f"{label} validation")
    axes.set(xlabel=AXES[x], ylabel="bits per byte")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(path, dpi=120)


def plot_levels(run_dirs: Mapping[str, Path], path: Path, x: str = "steps") -> None:
    """Draws |gradient| / |parameters| of every CMS level, a panel per run: levels that do not learn lie low.

    Args and errors are those of `plot_loss`.
    """
    figure = _figure(1 + 4 * len(run_dirs), 4.5)
    panels = figure.subplots(1, len(run_dirs), sharey=True, squeeze=False)[0]
    for axes, (label, run_dir) in zip(panels, run_dirs.items(), strict=True):
        records, position = read_metrics(run_dir), _position(run_dir, x)
        for level in sorted({level for record in records for level in ratios(record)}):
            at, values = _points(records, f"{level}/{GRADIENT_RATIO}", position)
            axes.plot(*smooth(at, values), label=level)
        axes.set(title=label, xlabel=AXES[x], yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("gradient norm / parameter norm")
    figure.savefig(path, dpi=120)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # the figure draws into memory, whatever display the machine has
    return figure


def smooth(at: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over windows of neighbours, at the middle of each; all points where there are few.

    >>> smooth(np.arange(3), np.array([1.0, 2.0, 6.0]))[1].tolist()
    [1.0, 2.0, 6.0]
    """
    width = max(1, len(values) // SMOOTHED)
    window = np.ones(width) / width
    return np.convolve(at, window, "valid"), np.convolve(values, window, "valid")


def _position(run_dir: Path, x: str) -> Callable[[Record], float]:
    """Where a record lies on the axis."""
    if x == "steps":
        return lambda record: record["step"]
    if x == "time":
        return lambda record: record.get("seconds", math.nan) / 3600
    config = read_config(run_dir)
    return lambda record: record["step"] * config.batch_size * config.seq_len


def _points(records: Sequence[Record], key: str, position: Callable[[Record], float]) -> tuple[np.ndarray, np.ndarray]:
    rows = [(position(record), record[key]) for record in records if key in record]
    points = np.array([row for row in rows if math.isfinite(row[0])]).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def plot_runs(run_dirs: Sequence[Path], path: Path, x: str = "steps", *, levels: bool = False) -> str:
    """What `hope plot` does: compares runs in one picture and says where it lies.

    Args:
      run_dirs, path, x: see `plot_loss`.
      levels: draw the gradients of the levels in the place of the losses.
    Raises:
      UserError: a run is none or has no records (yet), its records have no times or tell of no levels, or the picture
        cannot be written.
    """
    for run_dir in run_dirs:
        read_config(run_dir)  # says so when there is no run at all
        records = read_metrics(run_dir)
        if not records:
            raise UserError(f"{run_dir / METRICS_FILE} holds no records yet; plot the run when it has taken a step")
        if x == "time" and not any("seconds" in record for record in records):
            raise UserError(f"{run_dir} was trained before times were recorded; plot it with --x steps")
        if levels and not any(map(ratios, records)):
            raise UserError(f"{run_dir} has no records of CMS levels' gradients; plot its losses, without --levels")
    try:
        (plot_levels if levels else plot_loss)({str(run_dir): run_dir for run_dir in run_dirs}, path, x)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
        raise UserError(f"cannot write {path}: {reason}; give another place, for example --out runs.png") from error
    return f"wrote {path}: {len(run_dirs)} run{'s' if len(run_dirs) > 1 else ''} over {AXES[x]}"
