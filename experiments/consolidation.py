"""Sleep: what is left of what a session has read when its fast level is emptied, with and without consolidation?

    python -m experiments.consolidation --run runs/tiny --data FILE... [--buffers 256 1024 4096] [--keeps 0 0.01 0.1]
        [--bound 0.1] [--tiny]

A session reads the first `tokens` bytes of every text. Then its context is dropped, so that only levels remember, and
the bits per byte are measured of what it has read (the first `measured` bytes) and of a text that it has not (the last
`measured` bytes of a held-out part, what the parameters know):

    before         as the parameters were
    awake          after reading
    emptied        the fast level back at its start
    rested N, L    the fast level consolidated into the next one by replaying the last N bytes of what was read, with
                   lambda L (`keep`) holding that one where it was (spec 11.4)

Errors that wait for a slow level's clock when the reading ends are written while the first chunk is measured, the same
in the others. "kept" is the share of what emptying loses on what was read that sleep saves. Sleep is "accepted" where
it keeps something (`LEAST`) and what was not read costs at most `bound` bits per byte more than "emptied". Mean and
standard deviation over the texts. The picture is plots/consolidation.png, the numbers results/consolidation.json.
"""

import dataclasses
import math
import statistics
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from experiments.comparisons import Values, table_of, write_comparison
from experiments.options import at_least, run_script
from experiments.plots import figure_of, save
from experiments.sessions import session_maker, text_of
from experiments.text import corpus
from hope_jax import online
from hope_jax.training.errors import UserError

READ, UNREAD = KINDS = ("read", "not read")
RESTED = "rested"
LEAST = 0.01  # of what emptying loses: a sleep that keeps less keeps nothing

type Bits = dict[str, dict[str, list[float]]]  # state, kind: one per text


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
      keeps: lambda of consolidation.
      bound: bits per byte that sleep may add to what was not read, above those of the emptied session.
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
    keeps: tuple[float, ...] = (0.0, 0.01, 0.1)
    bound: float = 0.1
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
    keeps=(0.0,),
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
    rested = {
        f"{RESTED} {size}, {keep:g}": online.consolidate(
            awake, text[-size:], steps=options.steps, learning_rate=options.learning_rate, keep=keep
        )[0]
        for size in options.buffers
        for keep in options.keeps
    }
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


def compare(options: SleepOptions) -> Bits:
    """Bits of every state and kind of text, one per text."""
    make, found = session_maker(options.run, options.overrides, options.tiny), {}
    other = corpus(options.other).validation[-options.measured :]
    for data in track(options.data, "reading", transient=True):
        text = text_to_read(data, options)
        for name, session in states(make(online.always()), text, options).items():
            for kind, shown in zip(KINDS, (text[: options.measured], other), strict=True):
                found.setdefault(name, {}).setdefault(kind, []).append(bits(session, shown))
    return found


def kept(found: Bits, name: str) -> list[float]:
    """The share of what emptying loses that a state does not lose, one per text; nan where it loses nothing.

    >>> found = {"awake": {"read": [2.0, 3.0]}, "emptied": {"read": [3.0, 2.9]}, "rested": {"read": [2.25, 2.95]}}
    >>> kept(found, "rested")
    [0.75, nan]
    """
    states = (found[state][READ] for state in ("awake", "emptied", name))
    return [
        (emptied - mine) / (emptied - awake) if emptied > awake else math.nan
        for awake, emptied, mine in zip(*states, strict=True)
    ]


def accepted(found: Bits, name: str, bound: float) -> list[float]:
    """1 for each text of which a state has kept `LEAST`, the other text costing at most `bound` more than emptied."""
    others = zip(kept(found, name), found[name][UNREAD], found["emptied"][UNREAD], strict=True)
    return [float(share >= LEAST and mine <= emptied + bound) for share, mine, emptied in others]


def values_of(found: Bits, bound: float) -> Values:
    """The table's numbers."""
    return {
        name: {f"bits per byte, {kind}": by_kind[kind] for kind in KINDS}
        | ({"kept": kept(found, name), "accepted": accepted(found, name, bound)} if name.startswith(RESTED) else {})
        for name, by_kind in found.items()
    }


def draw(found: Bits, options: SleepOptions) -> Path:
    """A panel per kind of text, a point per text and state."""
    figure, panels = figure_of(len(KINDS), width=5)
    for axes, kind in zip(panels, KINDS, strict=True):
        for name, by_kind in found.items():
            axes.plot([name] * len(by_kind[kind]), by_kind[kind], "o", color="C0", alpha=0.5)
        axes.plot(list(found), [statistics.fmean(by_kind[kind]) for by_kind in found.values()], "_", color="C1", ms=20)
        axes.set(title=kind, ylabel="bits per byte")
        axes.tick_params(axis="x", rotation=30)
    return save(figure, options.out / "consolidation.png")


def run(options: SleepOptions, console: Console) -> tuple[Bits, Path]:
    """Compares, prints, writes and draws."""
    found = compare(options)
    over = f"{len(options.data)} texts; rested N, L: N bytes of replay, lambda L"
    values = values_of(found, options.bound)
    console.print(
        table_of(write_comparison("consolidation", "Sleep: what is kept, at what cost", over, values, options))
    )
    return found, draw(found, options)


if __name__ == "__main__":
    run_script(SleepOptions, TINY, lambda *given: run(*given)[1])
