"""Surprise gates: how much of what a session learns is kept when only some chunks are written (spec 11.1).

    python -m experiments.surprise_gates --run runs/tiny --data FILE... [--tokens 16384] [--tiny]

A session reads the first `tokens` bytes of every text once under each gate. Between "never" (a frozen model that
carries its context) and "always" lie the gates that look at the surprise of a chunk: "threshold" at a fixed number of
nats per token, which suits one model and text, the others beside that of the chunks before. "random" writes a share
of the chunks without looking, and "oracle" writes a chunk if that lowers the loss of the next `look` chunks, which no
gate can know. "gain" is what a gate saves of the loss on the second half of the text, as a share of what "always"
saves; mean and standard deviation over the texts, no number where "always" saves nothing. A gate is worth its name if
it lies above "random" at its share written.

The picture is plots/surprise_gates.png, the numbers results/surprise_gates.json.
"""

import dataclasses
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from experiments.comparisons import Values, table_of, write_comparison
from experiments.options import at_least, run_script
from experiments.plots import figure_of, save
from experiments.sessions import session_maker, text_of
from hope_jax import online
from hope_jax.online.report import join

ORACLE, RANDOM = "oracle", "random"
GATES = (
    *("never", "always", "threshold:2.0", "threshold:2.5", "threshold:3.0"),
    *("budget:0.125", "budget:0.25", "budget:0.5", "ema:1.2", "ema:1.0", "ema:0.8"),
)
SHARES = (0.125, 0.25, 0.5)


@dataclasses.dataclass(frozen=True)
class GateOptions:
    """Texts, and the run whose sessions read them.

    Attributes:
      run: a trained run; none = a small untrained model (with --tiny).
      data: "embedded" (its held-out part: runs/tiny was trained on the other) or text files.
      tokens: of each text.
      look: chunks that the oracle looks ahead.
      overrides: fields of the model config, as key=value.
      tiny: an untrained model, below runs/.
      out: folder of the picture.
      results: file of the numbers.
    """

    run: Path | None = None
    data: tuple[str, ...] = ("embedded",)
    tokens: int = 16_384
    look: int = 4
    overrides: tuple[str, ...] = ()
    tiny: bool = False
    out: Path = Path("experiments/plots")
    results: Path = Path("experiments/results/surprise_gates.json")

    def __post_init__(self) -> None:
        at_least(self, {"tokens": 512, "look": 1})


TINY = GateOptions(
    tokens=512, tiny=True, out=Path("runs/experiments"), results=Path("runs/experiments/surprise_gates.json")
)


class Reading(NamedTuple):
    """One text under one gate."""

    loss: float  # nats per token of the second half
    written: float  # share of all chunks


def read(session: online.Session, text: np.ndarray) -> Reading:
    """The whole text in one call."""
    return _reading(session.observe(text).chunks)


def read_randomly(session: online.Session, text: np.ndarray, share: float, seed: int = 0) -> Reading:
    """Each chunk is written with probability `share`."""
    rng, size, reports = np.random.default_rng(seed), session.chunk_size, []
    session.observe(text[:1])  # from here on a call of `size` tokens completes one chunk and its targets
    for begin in range(1, len(text), size):
        reports.append(session.observe(text[begin : begin + size], update_allowed=rng.random() < share).chunks)
    return _reading(join(reports, size, len(session.clocks)))


def read_with_oracle(session: online.Session, text: np.ndarray, look: int) -> Reading:
    """A chunk is written if that lowers the loss of the `look` chunks after it."""
    size, reports = session.chunk_size, []
    session.observe(text[:1])
    for begin in range(1, len(text) - size, size):
        tokens, ahead = text[begin : begin + size], text[begin + size : begin + (1 + look) * size]
        written, left = session.fork(), session.fork()
        mine, theirs = written.observe(tokens), left.observe(tokens, update_allowed=False)
        better = len(ahead) == 0 or written.score(ahead) < left.score(ahead)
        session, report = (written, mine) if better else (left, theirs)
        reports.append(report.chunks)
    return _reading(join(reports, size, len(session.clocks)))


def _reading(chunks: online.ChunkReport) -> Reading:
    half = len(chunks.losses) // 2
    return Reading(float(chunks.losses[half:].mean()), float(chunks.wrote.mean()))


def compare(options: GateOptions) -> dict[str, list[Reading]]:
    """Readings of every gate, one per text."""
    make, found = session_maker(options.run, options.overrides, options.tiny), {}
    texts = [text_of(data)[: options.tokens] for data in options.data]
    for text in track(texts, "reading", transient=True):
        readings = {name: read(make(online.parse_gate(name)), text) for name in GATES}
        readings |= {f"{RANDOM}:{share}": read_randomly(make(online.always()), text, share) for share in SHARES}
        readings[ORACLE] = read_with_oracle(make(online.always()), text, options.look)
        for name, reading in readings.items():
            found.setdefault(name, []).append(reading)
    return found


def gains(found: dict[str, list[Reading]], name: str) -> list[float]:
    """What a gate saves, as a share of what always writing saves, one per text; nan where that saves nothing.

    >>> found = {"never": [Reading(3.0, 0)], "always": [Reading(2.0, 1)], "ema": [Reading(2.5, 0.4)]}
    >>> gains(found, "ema"), gains(found | {"always": [Reading(3.5, 1)]}, "ema")
    ([0.5], [nan])
    """
    bounds = zip(found["never"], found["always"], found[name], strict=True)
    return [
        (never.loss - mine.loss) / (never.loss - always.loss) if always.loss < never.loss else math.nan
        for never, always, mine in bounds
    ]


def values_of(found: dict[str, list[Reading]]) -> Values:
    """The table's numbers, a row per gate."""
    return {
        name: {
            "chunks written": [one.written for one in readings],
            "nats per token, second half": [one.loss for one in readings],
            "gain": gains(found, name),
        }
        for name, readings in found.items()
    }


def draw(found: dict[str, list[Reading]], options: GateOptions) -> Path:
    """Gain over the share of chunks written."""
    figure, [axes] = figure_of(1, width=6)
    for family, marker in (
        ("budget", "o"),
        ("ema", "s"),
        ("threshold", "D"),
        (RANDOM, "x"),
        (ORACLE, "*"),
        ("always", "^"),
        ("never", "v"),
    ):
        names = [name for name in found if name.startswith(family)]
        points = sorted(
            (statistics.fmean(one.written for one in found[name]), statistics.fmean(gains(found, name)))
            for name in names
        )
        axes.plot(*zip(*points, strict=True), marker=marker, label=family, linewidth=0.8)
    axes.set(xlabel="share of chunks written", ylabel="share of the gain of always writing")
    axes.legend()
    return save(figure, options.out / "surprise_gates.png")


def run(options: GateOptions, console: Console) -> tuple[dict[str, list[Reading]], Path]:
    """Compares, prints, writes and draws."""
    found = compare(options)
    title = "Surprise gates: what of the gain of learning is left when only some chunks are written"
    over = f"{len(options.data)} texts; gain: the share of what always writing saves"
    console.print(table_of(write_comparison("surprise_gates", title, over, values_of(found), options)))
    return found, draw(found, options)


if __name__ == "__main__":
    run_script(GateOptions, TINY, lambda *given: run(*given)[1])
