"""What a slow level sees: levels of 4, 16 and 64 tokens as low-pass filters.

    python -m experiments.low_pass [--chunks 4 16 64] [--frequencies 200] [--step 1.0] [--tiny]

A nest of one level per chunk size C regresses a target that oscillates with frequency f, in cycles per token. Each
level is a matrix of key 1 that is written once in C tokens by its summed errors, with the step --step / C. At step 1
the write is exactly the mean of the chunk's targets, so of an amplitude of 1 a level holds (spec 11.2)

    |sin(pi f C) / (C sin(pi f))|                       half of the power at f = 0.443 / C, none at 1 / C

and with a smaller step eta it averages over its chunks too: times the filter of momentum 1 - eta at the level's own
clock, |eta / (1 - (1 - eta) exp(-2 pi i f C))| (spec 4.2). Sine and cosine are the two columns of the target, so that
the length of what a level holds is the amplitude, whatever the phase.

Measured at the defaults: half power at 0.4554 / C, 0.4437 / C and 0.4430 / C, and all 600 amplitudes within 2e-7 of the
formula. With --step 0.1 half power is at 0.0168 / C for each, that of momentum 0.9.

The picture is plots/low_pass.png. Seven seconds on one core (Intel Xeon).
"""

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from experiments.options import at_least, run_script
from experiments.plots import figure_of, save
from hope_jax import Tokens, l2_regression, level, linear_memory, nest
from hope_jax.training.errors import UserError

LOWEST = 1e-4  # cycles per token


@dataclasses.dataclass(frozen=True)
class LowPassOptions:
    """Which levels, and what they are shown.

    Attributes:
      chunks: tokens per write of each level, fastest first; each divides the next.
      frequencies: how many, from 0.0001 to 0.5 cycles per token, at equal ratios.
      step: eta of every level, times its chunk size; in (0, 1].
      writes: of the slowest level, before its amplitude is read.
      tiny: two levels and few frequencies, below runs/.
      out: folder of the picture.
    """

    chunks: tuple[int, ...] = (4, 16, 64)
    frequencies: int = 200
    step: float = 1.0
    writes: int = 100
    tiny: bool = False
    out: Path = Path("experiments/plots")

    def __post_init__(self) -> None:
        at_least(self, {"frequencies": 2, "writes": 1})
        if not self.chunks or any(slow % fast for fast, slow in itertools.pairwise(self.chunks)):
            raise UserError(f"chunks must divide, fastest first; got {self.chunks}")
        if not 0 < self.step <= 1:
            raise UserError(f"step must lie above 0 and not above 1; got {self.step}")


TINY = LowPassOptions(chunks=(2, 4), frequencies=20, writes=2, out=Path("runs/experiments/plots"))


def measured(frequencies_F: np.ndarray, options: LowPassOptions) -> np.ndarray:
    """[F, levels]: the amplitude that every level of one nest holds at the end, of an injected amplitude of 1."""
    levels = [
        level(linear_memory(1, 2), optax.sgd(options.step / c), c, objective=l2_regression) for c in options.chunks
    ]
    made = nest(*levels)
    angles_FT = 2 * np.pi * frequencies_F[:, None] * np.arange(options.writes * options.chunks[-1])
    targets_FTV = np.stack([np.cos(angles_FT), np.sin(angles_FT)], axis=-1).astype(np.float32)

    def held(target_TV: jax.Array) -> jax.Array:
        state = made.init(made.params(jax.random.key(0)))  # empty
        state, _ = made.apply(state, Tokens(jnp.ones((len(target_TV), 1)), target_TV))
        return jnp.stack([jnp.linalg.norm(one.start["w"]) for one in state.levels])

    return np.asarray(jax.jit(jax.vmap(held))(targets_FTV))


def predicted(frequencies_F: np.ndarray, chunk: int, step: float = 1.0) -> np.ndarray:
    """The formula, [F].

    >>> predicted(np.array([0.4437 / 16, 1 / 16]), 16).round(3).tolist()
    [0.707, 0.0]
    """
    mean = np.sin(np.pi * frequencies_F * chunk) / (chunk * np.sin(np.pi * frequencies_F))
    return np.abs(mean * step / (1 - (1 - step) * np.exp(-2j * np.pi * frequencies_F * chunk)))


def half_power(frequencies_F: np.ndarray, amplitudes_F: np.ndarray) -> float:
    """The first frequency at which half of the power is left, linear between those measured; nan if none.

    >>> round(half_power(np.array([0.1, 0.2, 0.3]), np.array([1.0, 0.8, 0.0])), 4)
    0.2219
    """
    power = amplitudes_F**2
    if not (power < 0.5).any() or power[0] < 0.5:
        return float("nan")
    i = int((power < 0.5).argmax())
    return float(np.interp(-0.5, -power[i - 1 : i + 1], frequencies_F[i - 1 : i + 1]))


def draw(frequencies_F: np.ndarray, amplitudes_FL: np.ndarray, options: LowPassOptions) -> Path:
    """Measured points over the formula's curves."""
    figure, [axes] = figure_of(1, width=8)
    fine = np.geomspace(frequencies_F[0], frequencies_F[-1], 4000)
    for number, chunk in enumerate(options.chunks):
        axes.plot(fine, predicted(fine, chunk, options.step), color=f"C{number}", linewidth=0.8)
        axes.plot(frequencies_F, amplitudes_FL[:, number], ".", color=f"C{number}", label=f"C = {chunk}")
    axes.axhline(0.5**0.5, color="grey", linewidth=0.5)
    axes.set(xscale="log", xlabel="cycles per token", ylabel="amplitude a level holds, of 1 (line: formula)")
    axes.legend()
    return save(figure, options.out / "low_pass.png")


def run(options: LowPassOptions, console: Console) -> tuple[Path, np.ndarray, np.ndarray]:
    """Prints the table.

    Returns:
      The path of the picture, the frequencies [F] and the amplitudes [F, levels].
    """
    frequencies_F = np.geomspace(LOWEST, 0.5, options.frequencies)
    amplitudes_FL = measured(frequencies_F, options)
    fine = np.geomspace(LOWEST, 0.5, 100_000)
    table = Table("C", "half power, measured", "formula", "times C", "largest distance from the formula")
    for chunk, amplitudes_F in zip(options.chunks, amplitudes_FL.T, strict=True):
        formula = predicted(frequencies_F, chunk, options.step)
        half = half_power(frequencies_F, amplitudes_F)
        exact = half_power(fine, predicted(fine, chunk, options.step))
        distance = np.abs(amplitudes_F - formula).max()
        table.add_row(str(chunk), f"{half:.5f}", f"{exact:.5f}", f"{half * chunk:.4f}", f"{distance:.1e}")
    console.print(table)
    return draw(frequencies_F, amplitudes_FL, options), frequencies_F, amplitudes_FL


if __name__ == "__main__":
    run_script(LowPassOptions, TINY, lambda *given: run(*given)[0])
