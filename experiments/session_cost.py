"""What a token of a session costs as its stream grows: time, memory and the size of the session's file.

    python -m experiments.session_cost [--tokens 1000000] [--run runs/tiny] [--tiny]

A session reads a stream of `tokens` bytes, the embedded corpus over and over, and learns from all of it. After every
`block` tokens these are noted: the time per token of the block, the most memory that the process had so far, and the
size of the saved session. All three should stay where they are: a session keeps weights and memories, not the text.
Without `--run` the model is an untrained Hope of two layers (D 32): the cost does not depend on what it knows.

The picture is plots/session_cost.png, the numbers results/session_cost.json. Ten million tokens: `--tokens 10000000`.
"""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from experiments.comparisons import Values, table_of, write_comparison
from experiments.options import at_least, run_script
from experiments.plots import figure_of, save
from experiments.text import corpus
from hope_jax import online
from hope_jax.models import ModelConfig, build_lm
from hope_jax.training.memory import memory_bytes

SMALL = ModelConfig(
    dim=32, layers=2, memory="linear", chunk_proj=16, chunk_mem=16, cms_hidden=(64, 64), cms_chunks=(32, 128)
)


@dataclasses.dataclass(frozen=True)
class CostOptions:
    """A stream and the model that reads it.

    Attributes:
      tokens: of the stream.
      block: tokens between two measurements.
      run: a trained run; none = a small untrained Hope.
      data: "embedded" or a text file.
      tiny: a short stream, below runs/.
      out: folder of the picture.
      results: file of the numbers.
    """

    tokens: int = 1_000_000
    block: int = 50_000
    run: Path | None = None
    data: str = "embedded"
    tiny: bool = False
    out: Path = Path("experiments/plots")
    results: Path = Path("experiments/results/session_cost.json")

    def __post_init__(self) -> None:
        at_least(self, {"block": 1, "tokens": 2 * self.block})


TINY = CostOptions(
    tokens=4096,
    block=1024,
    tiny=True,
    out=Path("runs/experiments"),
    results=Path("runs/experiments/session_cost.json"),
)


class Point(NamedTuple):
    """After a block."""

    tokens: int
    microseconds: float  # per token of the block
    memory: float  # bytes, the most so far
    file: int  # bytes of the session's file
    loss: float  # nats per token of the block


def measure(session: online.Session, text: np.ndarray, options: CostOptions) -> list[Point]:
    """Reads the stream block by block."""
    session.fork().observe(text[: options.block])  # compiles
    points = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "session"
        for begin in track(range(0, options.tokens, options.block), "reading", transient=True):
            block = text[np.arange(begin, begin + options.block) % len(text)]
            began = time.perf_counter()
            report = session.observe(block)
            took = time.perf_counter() - began
            session.save(path)
            size = path.stat().st_size
            [memory] = memory_bytes().values()
            points.append(Point(session.tokens, 1e6 * took / len(block), memory, size, report.before))
    return points


def values_of(points: list[Point]) -> Values:
    """Five blocks, the first to the last."""
    shown = sorted({0, len(points) // 4, len(points) // 2, 3 * len(points) // 4, len(points) - 1})
    return {
        f"{point.tokens:,} tokens": {
            "us per token": [point.microseconds],
            "peak memory, MiB": [point.memory / 2**20],
            "file, KiB": [point.file / 2**10],
            "nats per token": [point.loss],
        }
        for point in (points[i] for i in shown)
    }


def draw(points: list[Point], options: CostOptions) -> Path:
    """Time, memory and size over the length of the stream."""
    figure, panels = figure_of(3, width=4)
    tokens = [point.tokens for point in points]
    for axes, values, label in zip(
        panels,
        (
            [point.microseconds for point in points],
            [point.memory / 2**20 for point in points],
            [point.file / 2**10 for point in points],
        ),
        ("microseconds per token", "most memory so far, MiB", "size of the session's file, KiB"),
        strict=True,
    ):
        axes.plot(tokens, values, marker=".")
        axes.set(xlabel="tokens read", ylabel=label, ylim=(0, 1.3 * max(values)))
    return save(figure, options.out / "session_cost.png")


def run(options: CostOptions, console: Console) -> tuple[list[Point], Path]:
    """Measures, prints and draws."""
    text = corpus(options.data).train
    if options.run is None:
        session = online.Session(SMALL, build_lm(SMALL).init(jax.random.key(0)), measure_after=False)
    else:
        session = online.from_run(options.run, measure_after=False)
    points = measure(session, text, options)
    title = "What a token of a session costs"
    console.print(table_of(write_comparison("session_cost", title, "one stream", values_of(points), options)))
    return points, draw(points, options)


if __name__ == "__main__":
    run_script(CostOptions, TINY, lambda *given: run(*given)[1])
