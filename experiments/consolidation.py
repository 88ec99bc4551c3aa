"""Sleep: what is left of what a session has read when its fast level is emptied, with and without consolidation?

    python -m experiments.consolidation --run runs/tiny --data FILE... [--buffers 256 1024 4096] [--tiny]

A session reads the first `tokens` bytes of every text. Then its context is dropped, so that only levels remember, and
the bits per byte are measured of what it has read (the first `measured` bytes) and of a text that it has not (the last
`measured` bytes of a held-out part, what the parameters know):

    before     as the parameters were
    awake      after reading
    emptied    the fast level back at its start
    rested N   the fast level consolidated into the next one by replaying the last N bytes of what was read (spec 11.4)

Errors that wait for a slow level's clock when the reading ends are written while the first chunk is measured, the same
in the last three. Sleep is worth its name if "rested" lies below "emptied" on what was read and not above "awake" on
what was not. Mean and standard deviation over the texts. The picture is plots/consolidation.png, the numbers
results/consolidation.json.
"""

import dataclasses
import math
import statistics
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.cells import mean_and_spread
from experiments.options import at_least, from_command_line
from experiments.plots import figure_of, save
from experiments.records import write_json
from experiments.sessions import session_maker, text_of
from experiments.text import corpus
from hope_jax import online
from hope_jax.training.errors import UserError

KINDS = ("read", "not read")


@dataclasses.dataclass(frozen=True)
class SleepOptions:
    """Texts, and the run whose sessions read them.

    Attributes:
      run: a trained run; none = a small untrained model (with --tiny).
      data: "embedded" (its held-out part) or text files, to be read.
      other: "embedded" or a text file whose held-out part is not read.
      tokens: of each text.
      measured: bytes of a measurement.
      buffers: bytes of replay.
      steps: of consolidation.
      learning_rate: of consolidation.
      overrides: fields of the model config, as key=value.
      tiny: an untrained model, below runs/.
      out: folder of the picture.
      results: file of the numbers.
    """

    run: Path | None = None
    data: tuple[str, ...] = ("embedded",)
    other: str = "embedded"
    tokens: int = 8192
    measured: int = 2048
    buffers: tuple[int, ...] = (256, 1024, 4096)
    steps: int = 200
    learning_rate: float = 1e-3
    overrides: tuple[str, ...] = ()
    tiny: bool = False
    out: Path = Path("experiments/plots")
    results: Path = Path("experiments/results/consolidation.json")

    def __post_init__(self) -> None:
        at_least(self, {"tokens": 2, "measured": 2, "steps": 1})
        if not self.buffers or not 2 <= min(self.buffers) <= max(self.buffers) <= self.tokens:
            raise UserError(f"buffers hold 2 to tokens={self.tokens} bytes of what was read; got {list(self.buffers)}")


TINY = SleepOptions(
    tokens=512,
    measured=128,
    buffers=(256,),
    steps=20,
    tiny=True,
    out=Path("runs/experiments"),
    results=Path("runs/experiments/consolidation.json"),
)


def states(session: online.Session, text: np.ndarray, options: SleepOptions) -> dict[str, online.Session]:
    """The sessions that are measured, by name; the given one has read nothing."""
    awake = session.fork()
    awake.observe(text)
    emptied = awake.fork()
    emptied.forget("fast")
    how = {"steps": options.steps, "learning_rate": options.learning_rate}
    rested = {f"rested {size}": online.consolidate(awake, text[-size:], **how)[0] for size in options.buffers}
    return {"before": session, "awake": awake, "emptied": emptied, **rested}


def text_to_read(data: str, options: SleepOptions) -> np.ndarray:
    """The first `tokens` bytes, which `other` is no part of.

    Raises:
      UserError: the text is too short.
    """
    text = text_of(data)
    needed = options.tokens + (options.measured if data == options.other else 0)
    if len(text) < needed:
        raise UserError(f"{data} has {len(text)} bytes where {needed} are needed; lower --tokens or give a longer text")
    return text[: options.tokens]


def bits(session: online.Session, text: np.ndarray) -> float:
    """Bits per byte of a text by what levels and parameters know of it, without the context."""
    alone = session.fork()
    alone.forget("context")
    return alone.score(text) / math.log(2)


def compare(options: SleepOptions) -> dict[str, dict[str, list[float]]]:
    """Bits of every state and kind of text, one per text."""
    make, found = session_maker(options.run, options.overrides, options.tiny), {}
    other = corpus(options.other).validation[-options.measured :]
    for data in track(options.data, "reading", transient=True):
        text = text_to_read(data, options)
        for name, session in states(make(online.always()), text, options).items():
            for kind, shown in zip(KINDS, (text[: options.measured], other), strict=True):
                found.setdefault(name, {}).setdefault(kind, []).append(bits(session, shown))
    return found


def table_of(found: dict[str, dict[str, list[float]]]) -> Table:
    """One row per state."""
    table = Table("state", *(f"bits per byte, {kind}" for kind in KINDS))
    for name, by_kind in found.items():
        shown = (by_kind[kind] for kind in KINDS)
        table.add_row(name, *map(mean_and_spread, shown))
    return table


def draw(found: dict[str, dict[str, list[float]]], options: SleepOptions) -> Path:
    """A panel per kind of text, a point per text and state."""
    figure, panels = figure_of(len(KINDS), width=5)
    for axes, kind in zip(panels, KINDS, strict=True):
        for name, by_kind in found.items():
            axes.plot([name] * len(by_kind[kind]), by_kind[kind], "o", color="C0", alpha=0.5)
        axes.plot(list(found), [statistics.fmean(by_kind[kind]) for by_kind in found.values()], "_", color="C1", ms=20)
        axes.set(title=kind, ylabel="bits per byte")
        axes.tick_params(axis="x", rotation=30)
    return save(figure, options.out / "consolidation.png")


def run(options: SleepOptions, console: Console) -> tuple[dict[str, dict[str, list[float]]], Path]:
    """Compares, prints, writes and draws."""
    found = compare(options)
    console.print(table_of(found))
    write_json(options.results, found)
    return found, draw(found, options)


if __name__ == "__main__":
    try:
        print(run(from_command_line(SleepOptions, TINY), Console())[1])
    except (UserError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
