"""A fast bias and a slow slope on a drifting line: why two clocks learn what one does not.

    python -m experiments.two_timescales [--steps 500] [--seeds 100] [--slow-chunk 1] [--tiny]

A stream y_t = 2 x_t + 5 sin(t / 4) with x_t ~ N(0, 1) is predicted by w x + b from w = b = 0, and both learn from the
same error e = y - w x - b at every token:

    nested          b <- 0.5 b + 0.8 e, which forgets, and w <- w + 0.05 e x, which does not: the bias follows the
                    sine and the slope averages over it
    single clock    b <- b + 0.05 e and w <- w + 0.05 e x: neither follows, and the sine shakes the slope

Bias and slope are matrices [1, 1] of a `nest` with keys 1 and x. With --slow-chunk C the slope is written once in C
tokens, by the sum of their errors: two clocks rather than two rates.

At the defaults, mean of 100 seeds: mean |e| 1.35 nested and 3.23 with a single clock, mean |w - 2| over the second half
0.20 and 0.49; nested is better on both for every seed. With --slow-chunk 16 the nested ones are 1.37 and 0.26.

The picture is plots/two_timescales.png. Six seconds on one core (Intel Xeon).
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from experiments.options import at_least, run_script
from experiments.plots import figure_of, save
from hope_jax import Nest, Outer, level, linear_memory, nest, retention

SLOPE = 2.0  # of the stream; its bias is 5 sin(t / 4)


@dataclasses.dataclass(frozen=True)
class TimescaleOptions:
    """The stream and how it is learned.

    Attributes:
      steps: tokens of the stream.
      seeds: streams, of other inputs each.
      slow_chunk: tokens per write of the nested slope.
      tiny: a short stream, below runs/.
      out: folder of the picture.
    """

    steps: int = 500
    seeds: int = 100
    slow_chunk: int = 1
    tiny: bool = False
    out: Path = Path("experiments/plots")

    def __post_init__(self) -> None:
        at_least(self, {"steps": 2, "seeds": 2, "slow_chunk": 1})


TINY = TimescaleOptions(steps=20, seeds=2, out=Path("runs/experiments/plots"))


class Way(NamedTuple):
    """The constants of b <- keep b + fast e and w <- w + slow e x."""

    keep: float
    fast: float
    slow: float


WAYS = {"nested": Way(0.5, 0.8, 0.05), "single clock": Way(1.0, 0.05, 0.05)}


class Curves(NamedTuple):
    """Of every seed."""

    errors_ST: Any  # e of each token
    slopes_ST: Any  # the w that predicted it


def stream(steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """x [T] and y [T], float64."""
    x = np.random.default_rng(seed).normal(size=steps)
    return x, SLOPE * x + 5 * np.sin(np.arange(steps) / 4)


def learner(way: Way, slow_chunk: int = 1) -> Nest:
    """The nest of bias and slope; it reads (x [T], y [T]) and returns (e [T], w [T])."""
    bias = level(linear_memory(1, 1), optax.chain(optax.sgd(way.fast), retention(way.keep)), 1)
    slope = level(linear_memory(1, 1), optax.sgd(way.slow), slow_chunk)

    def error(params_by_level: tuple[Any, ...], carry: Any, chunk: tuple[jax.Array, jax.Array]) -> Any:
        (b, w), (x, y) = (params["w"][0, 0] for params in params_by_level), chunk
        e = y - w * x - b
        factors = [{"w": Outer(delta=-e[:, None], key=key[:, None])} for key in (jnp.ones_like(x), x)]
        return tuple(factors), carry, (e, jnp.full_like(x, w))

    return nest(bias, slope, error=error)


def learn(way: Way, x_ST: Any, y_ST: Any, slow_chunk: int = 1) -> Curves:
    """Every stream learned by a nest of its own."""
    made = learner(way, slow_chunk)
    zeros = ({"w": jnp.zeros((1, 1))},) * 2
    return Curves(*jax.jit(jax.vmap(lambda x, y: made.apply(made.init(zeros), (x, y))[1]))(x_ST, y_ST))


def loop(way: Way, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One stream in plain Python, the definition: e [T] and w [T]."""
    w = b = 0.0
    errors, slopes = [], []
    for x_t, y_t in zip(x, y, strict=True):
        e = y_t - w * x_t - b
        errors.append(e)
        slopes.append(w)
        b, w = way.keep * b + way.fast * e, w + way.slow * e * x_t
    return np.array(errors), np.array(slopes)


def summary(curves: Curves) -> tuple[np.ndarray, np.ndarray]:
    """Of every seed: mean |e|, and mean |w - 2| over the second half."""
    errors, slopes = map(np.asarray, curves)
    return np.abs(errors).mean(axis=1), np.abs(slopes - SLOPE)[:, slopes.shape[1] // 2 :].mean(axis=1)


def draw(found: dict[str, Curves], options: TimescaleOptions) -> Path:
    """Cumulative |e| and the slope over time: the first seed, and between which two values all of them lie."""
    figure, (cumulative, slope) = figure_of(2, width=6)
    for name, curves in found.items():
        for axes, lines in ((cumulative, np.abs(curves.errors_ST).cumsum(axis=1)), (slope, np.asarray(curves[1]))):
            axes.plot(lines[0], linewidth=1, label=name)
            axes.fill_between(np.arange(lines.shape[1]), lines.min(axis=0), lines.max(axis=0), alpha=0.2)
    slope.axhline(SLOPE, color="grey", linewidth=0.5)
    cumulative.set(xlabel="token", ylabel="cumulative |e|")
    slope.set(xlabel="token", ylabel="slope estimate w")
    cumulative.legend()
    return save(figure, options.out / "two_timescales.png")


def run(options: TimescaleOptions, console: Console) -> tuple[Path, dict[str, Curves]]:
    """Prints the table; returns the path of the picture and what it shows."""
    x_ST, y_ST = map(np.stack, zip(*(stream(options.steps, seed) for seed in range(options.seeds)), strict=True))
    chunks = {"nested": options.slow_chunk, "single clock": 1}
    found = {name: learn(way, x_ST, y_ST, chunks[name]) for name, way in WAYS.items()}
    table = Table("", "mean |e|", "mean |w - 2|, second half", title=f"{options.seeds} seeds")
    for name, curves in found.items():
        table.add_row(name, *(f"{seeds.mean():.2f} ± {seeds.std(ddof=1):.2f}" for seeds in summary(curves)))
    console.print(table)
    nested, single = map(summary, found.values())
    better = np.logical_and(*(ours < theirs for ours, theirs in zip(nested, single, strict=True))).sum()
    console.print(f"nested is better on both for {better} of {options.seeds} seeds")
    return draw(found, options), found


if __name__ == "__main__":
    run_script(TimescaleOptions, TINY, lambda *given: run(*given)[0])
