"""What a run shows while it trains: a live line on a terminal, one line now and then anywhere else."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# What a line says of a step; numbers that are not known (yet) are left out.
NUMBERS = {
    "loss": "loss {:.3f}",
    "bits_per_byte": "{:.3f} bits/byte",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
}


class Display:
    """Shows the latest numbers of a run; use as a context manager.

    Args:
      console: where to; lines go to it above the live line.
      label: the name of the model.
      steps: the last step.
      start: the step to start at.
      lines: without a terminal, how many plain lines over a whole run.
    """

    def __init__(self, console: Console, label: str, steps: int, start: int = 0, lines: int = 20):
        self.console, self.label, self.steps = console, label, steps
        self._stride = max(1, steps // lines)
        self._progress = Progress(
            TextColumn(label),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task(label, total=steps, completed=start, numbers="compiling ...")

    def update(self, step: int, record: Mapping[str, float]) -> None:
        """Shows the record of a step."""
        numbers = "  ".join(form.format(record[name]) for name, form in NUMBERS.items() if name in record)
        self._progress.update(self._task, completed=step, numbers=numbers)
        if not self.console.is_terminal and (step % self._stride == 0 or step == self.steps):
            self.console.print(f"{self.label} step {step}/{self.steps}  {numbers}")

    def print(self, text: str) -> None:
        """Prints a line that stays."""
        self.console.print(text, markup=False, highlight=False)

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._progress.stop()


def table(title: str, rows: Mapping[str, Mapping[str, str]]) -> Any:
    """A table with one row per name; the columns are the keys of the first row."""
    from rich.table import Table

    result = Table(title=title, title_justify="left")
    result.add_column("")
    for column in next(iter(rows.values())):
        result.add_column(column, justify="right")
    for name, values in rows.items():
        result.add_row(name, *values.values())
    return result
