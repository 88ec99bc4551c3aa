"""Do slow levels learn? Four CMS levels started together, against one level that gets faster ones in front of it.

    python -m experiments.progressive_stacking [--model hope_attention] [--clocks 1 4 16 64] [--steps 640] [--dim 64]
        [--seeds 0 1 2] [--tiny]

    cold          all levels from the first step
    progressive   as many stages as levels, of equal length: the first trains one level, each further one begins from
                  the one before (`start.run`, momenta carried) with a level in front whose W1 is zero, and the levels
                  that were there get the next slower clock

Both end with the same model, clocks and number of steps, at a constant learning rate after the warm-up of each run; the
stages see other batches (a seed each). Of every level, over the steps and under the number that it has at the end:

    gradient   |gradient| / |parameters|, of every step, also of those that do not write the level
    movement   the sum of the norms of its updates so far

The picture, of the first seed, is plots/progressive_stacking.png, the numbers are in results/progressive_stacking.json,
the runs in runs/experiments/progressive_stacking/. A seed takes two CPU minutes.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from experiments.comparisons import Values, table_of, write_comparison
from experiments.options import at_least, run_script
from experiments.plots import save
from hope_jax.models import ModelConfig
from hope_jax.training.config import StartConfig, TrainConfig
from hope_jax.training.errors import UserError
from hope_jax.training.level_health import dead_levels, ratios
from hope_jax.training.loop import train
from hope_jax.training.metrics import read_metrics
from hope_jax.training.plots import smooth
from hope_jax.training.telemetry import UPDATE_NORM

WAYS = ("cold", "progressive")


@dataclasses.dataclass(frozen=True)
class StackingOptions:
    """One model trained in two ways.

    Attributes:
      model: "hope_attention" or "hope".
      clocks: steps between two writes of each level at the end, fastest first.
      steps: of all stages together.
      dim: width of the model; each level is as wide.
      layers: blocks.
      length: bytes of a window.
      batch_size: windows per step.
      learning_rate: after the warm-up.
      seeds: of the parameters and the batches.
      data: as `hope train` takes it.
      tiny: a few steps.
      runs: folder of the runs; those that are there are replaced.
      out: folder of the picture.
      results: file of the numbers.
    """

    model: str = "hope_attention"
    clocks: tuple[int, ...] = (1, 4, 16, 64)
    steps: int = 640
    dim: int = 64
    layers: int = 2
    length: int = 128
    batch_size: int = 8
    learning_rate: float = 1e-3
    seeds: tuple[int, ...] = (0,)
    data: str = "embedded"
    tiny: bool = False
    runs: Path = Path("runs/experiments/progressive_stacking")
    out: Path = Path("experiments/plots")
    results: Path = Path("experiments/results/progressive_stacking.json")

    def __post_init__(self) -> None:
        at_least(self, {"steps": 1, "dim": 1, "layers": 1, "length": 1, "batch_size": 1})
        if not self.seeds or min(self.seeds) < 0:
            raise UserError(f"seeds must be numbers from 0 on, at least one; got {list(self.seeds)}")
        if len(self.clocks) < 2:
            raise UserError(f"clocks must be those of two levels or more; got {self.clocks}")
        if self.steps % len(self.clocks):
            raise UserError(
                f"steps={self.steps} are not {len(self.clocks)} stages of equal length; "
                f"give a multiple of {len(self.clocks)}"
            )


TINY = StackingOptions(
    clocks=(1, 2),
    steps=8,
    dim=16,
    layers=1,
    length=16,
    batch_size=2,
    runs=Path("runs/experiments/progressive_stacking_tiny"),
    out=Path("runs/experiments/plots"),
    results=Path("runs/experiments/progressive_stacking_tiny.json"),
)


class Curves(NamedTuple):
    """Of one level over the steps of all stages."""

    steps: np.ndarray
    gradient: np.ndarray  # |gradient| / |parameters|
    movement: np.ndarray  # sum of the norms of the updates so far


class Result(NamedTuple):
    """Of one way."""

    levels: list[Curves]  # by the number they have at the end, fastest first
    bits_per_byte: float  # of the whole validation text
    dead: list[str]  # as `hope train` would say at the end


def config_of(options: StackingOptions, levels: int, steps: int, seed: int) -> TrainConfig:
    """A run with the first `levels` of the clocks."""
    model = ModelConfig(
        name=options.model,
        dim=options.dim,
        layers=options.layers,
        heads=2,
        cms_hidden=(options.dim,) * levels,
        eta_init=0.002,
        error_clip=1.0,
        max_length=max(options.length, 16),
    )
    return TrainConfig(
        model=model,
        data=options.data,
        seed=seed,
        steps=steps,
        batch_size=options.batch_size,
        seq_len=options.length,
        learning_rate=options.learning_rate,
        final_learning_rate=options.learning_rate,
        warmup_steps=min(20, steps // 4),
        cms_periods=options.clocks[:levels],
        eval_every=steps,
        checkpoint_every=steps,
    )


def cold(options: StackingOptions, seed: int) -> tuple[list[Path], float]:
    """All levels at once: the run, and its validation bits per byte."""
    config = config_of(options, len(options.clocks), options.steps, _of_stage(options, seed, 0))
    result = train(config, options.runs / f"seed_{seed}" / "cold", overwrite=True)
    return [result.run_dir], _finished(result.validation_bpb)


def progressive(options: StackingOptions, seed: int) -> tuple[list[Path], float]:
    """A level more in every stage: the runs, and the validation bits per byte of the last."""
    stages, bpb = [], 0.0
    for number in range(len(options.clocks)):
        config = config_of(options, number + 1, options.steps // len(options.clocks), _of_stage(options, seed, number))
        if stages:
            config = dataclasses.replace(config, start=StartConfig(run=str(stages[-1])))
        result = train(config, options.runs / f"seed_{seed}" / f"stage_{number + 1}", overwrite=True)
        stages.append(result.run_dir)
        bpb = _finished(result.validation_bpb)
    return stages, bpb


def _of_stage(options: StackingOptions, seed: int, number: int) -> int:
    """A seed that no other stage has, of this seed or another."""
    return len(options.clocks) * seed + number


def _finished(bpb: float | None) -> float:
    if bpb is None:
        raise KeyboardInterrupt
    return bpb


def curves(run_dirs: list[Path], levels: int) -> list[Curves]:
    """The curves of the levels of runs that follow each other, under their numbers at the end."""
    points: list[list[tuple[float, float, float]]] = [[] for _ in range(levels)]
    begun = 0
    for run_dir in run_dirs:
        records = [record for record in read_metrics(run_dir) if ratios(record)]
        for record in records:
            shift = levels - len(ratios(record))  # as many levels are still to come in front
            for number, (level, ratio) in enumerate(ratios(record).items()):
                points[number + shift].append((begun + record["step"], ratio, record[f"{level}/{UPDATE_NORM}"]))
        begun += int(records[-1]["step"])
    arrays = [np.array(one).T for one in points]
    return [Curves(steps, gradient, np.cumsum(update)) for steps, gradient, update in arrays]


def measure(options: StackingOptions, seed: int) -> dict[str, Result]:
    """Trains both ways."""
    results = {}
    for way, trained in zip(WAYS, (cold, progressive), strict=True):
        run_dirs, bpb = trained(options, seed)
        found = curves(run_dirs, len(options.clocks))
        results[way] = Result(found, bpb, dead_levels(read_metrics(run_dirs[-1])))
    return results


def values_of(by_seed: list[dict[str, Result]], options: StackingOptions) -> Values:
    """A row per way, and one for each of its levels."""
    rows: dict[str, dict[str, list[float]]] = {}
    for way in WAYS:
        results = [found[way] for found in by_seed]
        medians = [[float(np.median(one.gradient[-_tail(options) :])) for one in result.levels] for result in results]
        rows[way] = {"bits per byte": [one.bits_per_byte for one in results]}
        for number, clock in enumerate(options.clocks):
            levels = [result.levels[number] for result in results]
            rows[f"{way}, level_{number}, clock {clock}"] = {
                "gradient": [one[number] for one in medians],
                "over the greatest": [one[number] / max(one) for one in medians],
                "least": [float(np.min(smooth(one.steps, one.gradient)[1])) for one in levels],
                "movement": [float(one.movement[-1]) for one in levels],
                "hardly learning": [float(f"level_{number}" in one.dead) for one in results],
            }
    return rows


def run(options: StackingOptions, console: Console) -> tuple[Path, list[dict[str, Result]]]:
    """Trains both ways with every seed, prints, writes and draws.

    Returns:
      The path of the picture, and the results by way for each seed.
    """
    by_seed = [measure(options, seed) for seed in options.seeds]
    title = "Levels started together and one after another: gradient and movement"
    values = values_of(by_seed, options)
    console.print(table_of(write_comparison("progressive_stacking", title, f"{len(by_seed)} seeds", values, options)))
    return draw(by_seed[0], options), by_seed


def _tail(options: StackingOptions) -> int:
    """The steps of the last stage; the table has medians over their second half."""
    return max(1, options.steps // len(options.clocks) // 2)


def draw(results: dict[str, Result], options: StackingOptions) -> Path:
    """A column per way: gradients above, movements below, one colour per level."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(results), sharex=True, sharey="row")
    for (above, below), (way, result) in zip(panels.T, results.items(), strict=True):
        for number, one in enumerate(result.levels):
            label = f"level_{number}, every {options.clocks[number]}"
            above.plot(*smooth(one.steps, one.gradient), color=f"C{number}", label=label)
            below.plot(one.steps, one.movement, color=f"C{number}", label=label)
        above.set(title=f"{way}, {result.bits_per_byte:.3f} bits per byte", yscale="log")
        below.set(xlabel="step", yscale="log")
        for axes in (above, below):
            axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("gradient norm / parameter norm")
    panels[1, 0].set_ylabel("sum of update norms")
    panels[0, 0].legend(fontsize=7)
    return save(figure, options.out / "progressive_stacking.png")


if __name__ == "__main__":
    run_script(StackingOptions, TINY, lambda *given: run(*given)[0])
