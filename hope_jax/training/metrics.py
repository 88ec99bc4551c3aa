"""Where the numbers of a run go: metrics.jsonl, TensorBoard events and loss.png, all in the run directory."""

import json
from pathlib import Path
from typing import Any

from hope_jax.training.files import write_text

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends records to metrics.jsonl and TensorBoard; use as a context manager.

    A record is a flat dict with a "step"; training and evaluation numbers differ in their keys.

    Args:
      run_dir: an existing directory.
      resume_step: records after this step belong to steps that will be repeated and are dropped.
    """

    def __init__(self, run_dir: Path, resume_step: int = 0):
        from tensorboardX import SummaryWriter

        self.path = run_dir / METRICS_FILE
        kept = [record for record in read_metrics(run_dir) if record["step"] <= resume_step]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = self.path.open("a")
        self._events = SummaryWriter(str(run_dir), purge_step=resume_step + 1 if resume_step else None)

    def write(self, step: int, **values: float) -> None:
        """Writes one record."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc: Any) -> None:
        self._file.close()
        self._events.close()


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The records of a run, in the order of writing; a line cut short by a crash is dropped."""
    path = run_dir / METRICS_FILE
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def plot_loss(run_dirs: dict[str, Path], path: Path) -> None:
    """Draws training and validation bits per byte over steps, one colour per run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)  # the figure draws into memory, whatever display the machine has
    axes = figure.subplots()
    for colour, (label, run_dir) in enumerate(run_dirs.items()):
        records = read_metrics(run_dir)
        for name, marker in (("training", ""), ("validation", "o")):
            key = "bits_per_byte" if name == "training" else "validation_bits_per_byte"
            points = [(record["step"], record[key]) for record in records if key in record]
            if points:
                steps, values = zip(*points, strict=True)
                alpha = 1.0 if marker else 0.4
                axes.plot(steps, values, marker=marker, alpha=alpha, color=f"C{colour}", label=f"{label} {name}")
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(path, dpi=120)
