"""`hope watch RUN`: a run on the terminal, live."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hope_jax.training.errors import UserError
from hope_jax.training.level_health import STEPS, dead_levels, ratios
from hope_jax.training.run_view import Reader, View, duration
from hope_jax.training.telemetry import DISTANCE, GRADIENT_RATIO, UPDATE_NORM, WAITED

BARS = "▁▂▃▄▅▆▇█"
REFRESH = 1.0  # seconds
NOTHING = "-"


def watch(run_dir: Path, *, once: bool = False, console: Console | None = None) -> None:
    """Shows a run until Ctrl-C, or as it is now.

    Args:
      run_dir: a run, or where one will be.
      once: print it and return; so it is too where the output is not a terminal.
      console: where to.
    Raises:
      UserError: `once`, and there is no run; or its config cannot be read.
    """
    console = console or Console(highlight=False, emoji=False)
    reader = Reader(run_dir)
    if once or not console.is_terminal:
        view = reader.view()
        if view is None:
            raise UserError(f"{run_dir} holds no run (yet); train one there with --run {run_dir}, or give another")
        console.print(dashboard(view, console.width))
        return
    try:
        with Live(console=console, auto_refresh=False, screen=False) as live:
            while True:
                view = reader.view()
                waiting = Text(f"{run_dir}: no run here (yet); waiting for one, Ctrl-C leaves")
                live.update(waiting if view is None else dashboard(view, console.width), refresh=True)
                time.sleep(REFRESH)
    except KeyboardInterrupt:
        return


def dashboard(view: View, width: int = 80) -> Any:
    """What is shown of a run.

    Args:
      view: the run.
      width: of the terminal, in characters.
    """
    parts = [_heading(view), _losses(view, width), _numbers(view), _time(view)]
    return Group(*parts, *_levels(view))


def _heading(view: View) -> Text:
    config = view.config
    colour = {"finished": "green", "running": "cyan"}.get(view.status, "yellow")
    text = Text.assemble((str(view.run_dir), "bold"), "  ", (view.status, colour), overflow="fold")
    text.append(f"\n{config.model.name}, step {view.step:,} of {config.steps:,}")
    text.append(f" ({view.step / config.steps:.0%}), last checkpoint: ")
    text.append("none" if view.saved is None else f"step {view.saved:,}")
    if config.start.run:
        text.append(f", begun from {config.start.run}")
    seconds = view.latest("step_seconds")
    if view.status == "running" and seconds:
        text.append(f", about {duration((config.steps - view.step) * seconds)} of steps left")
    return text


def sparkline(values: list[float], width: int) -> str:
    """A line of bars, each the mean of as many values as it stands for.

    >>> sparkline([3.0, 2.0, 1.0, 0.0], 4), sparkline([1.0, 1.0], 9), sparkline([], 9)
    ('█▆▃▁', '▁▁', '')
    """
    if not values:
        return ""
    means = np.array([part.mean() for part in np.array_split(np.array(values), min(width, len(values)))])
    spread = means.max() - means.min()
    heights = (means - means.min()) / spread if spread > 0 else np.zeros_like(means)
    return "".join(BARS[int(height * (len(BARS) - 1) + 0.5)] for height in heights)


def _losses(view: View, width: int) -> Table:
    table = Table.grid(padding=(0, 2))
    for label, name in (("training", "bits_per_byte"), ("validation", "validation_bits_per_byte")):
        values = view.series(name)
        last = f"{values[-1]:.4f} bits/byte (least {min(values):.4f})" if values else NOTHING
        table.add_row(label, last, sparkline(values, max(10, min(width - 56, 60))))
    return table


def _numbers(view: View) -> Table:
    """Two columns of names and values."""
    rows = [
        ("loss", _form(view.latest("loss"), "{:.4f} nats/byte")),
        ("tokens/s", _form(view.latest("tokens_per_second"), "{:,.0f}")),
        ("gradient norm", _form(view.latest("grad_norm"), "{:.4g}")),
        ("step time", _step_time(view)),
        ("update norm", _form(view.latest("update_norm"), "{:.4g}")),
        ("MFU", _form(view.latest("mfu"), "{:.1%}") if view.latest("mfu") else "n/a (give peak_flops=...)"),
        ("learning rate", _form(view.latest("learning_rate"), "{:.3g}")),
        ("goodput", _form(view.summary.goodput if view.incarnations else None, "{:.1%}")),
        ("parameter norm", _form(view.latest("params_norm"), "{:.4g}")),
        ("memory", _memory(view)),
    ]
    table = Table.grid(padding=(0, 2))
    for left, right in zip(rows[::2], rows[1::2], strict=True):
        table.add_row(*left, *right)
    return table


def _form(value: float | None, form: str) -> str:
    return NOTHING if value is None else form.format(value)


def _step_time(view: View) -> str:
    median, slow = view.latest("step_seconds"), view.latest("step_seconds_p95")
    return NOTHING if median is None or slow is None else f"{duration(median)} (p95 {duration(slow)})"


def _memory(view: View) -> str:
    for name, what in (("device_memory_bytes", "of the fullest device"), ("process_memory_bytes", "of the process")):
        if (value := view.latest(name)) is not None:
            return f"{value / 2**30:.2f} GiB {what}, at most"
    return NOTHING


def _time(view: View) -> Text:
    if not view.incarnations:
        return Text("")
    found = view.summary
    shares = [f"{name} {duration(value)}" for name, value in found.seconds.items() if value >= 0.05]
    restarts = len(view.incarnations) - 1
    again = f", {restarts} restart{'s' if restarts != 1 else ''}" if restarts else ""
    return Text(f"wall time {duration(found.wall)}{again}: {', '.join(shares)}")


def _levels(view: View) -> list[Table]:
    if not view.levels:
        return []
    table = Table(title="levels", title_justify="left")
    table.add_column("")
    for column in ("written", "last update", "gradient / weights", "distance from the start"):
        table.add_column(column, justify="right")
    steps = map(ratios, view.records[-2 * STEPS :])  # evaluations lie between them
    dead = dead_levels(found for found in steps if found)
    for level in view.levels:
        updates = [norm for norm in view.series(f"{level}/{UPDATE_NORM}") if norm]
        last = _form(updates[-1] if updates else None, "{:.4g}")
        ratio = _form(view.latest(f"{level}/{GRADIENT_RATIO}"), "{:.4g}")
        name = Text.assemble(level, (" hardly learns", "yellow") if level in dead else "")
        table.add_row(name, _written(view, level), last, ratio, _distance(view, level))
    return [table]


def _written(view: View, level: str) -> str:
    """When a level was last written."""
    waited = int(view.latest(f"{level}/{WAITED}") or 0)
    if not waited:
        return "in the last step"
    if waited == view.step:
        return "never"
    seconds = view.latest("step_seconds")
    return f"{waited} step{'s' if waited > 1 else ''} ago" + (f" ({duration(waited * seconds)})" if seconds else "")


def _distance(view: View, level: str) -> str:
    """As it was at the last evaluation."""
    name = f"{level}/{DISTANCE}"
    record = next((record for record in reversed(view.records) if name in record), None)
    return NOTHING if record is None else f"{record[name]:.4g} at step {record['step']:,}"
