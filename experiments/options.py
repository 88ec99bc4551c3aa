"""The options every experiment has, its command line, and the cells of its grid."""

import dataclasses
import hashlib
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from hope_jax.models import ARCHITECTURES, ModelConfig, check_sequence_length, match_parameters
from hope_jax.training.errors import UserError
from hope_jax.training.overrides import apply_overrides, one_line, to_dict, unknown

RESULTS = Path("experiments/results")
TINY_RESULTS = Path("runs/experiments")
STEADY: dict[str, Any] = {"eta_init": 0.002, "error_clip": 1.0}
BYTES = 256  # tokens of a text that is read byte by byte
TEST_SEED = 1_000_003  # of test data, apart from the seeds of training
HOW_IT_RUNS = ("tiny", "overwrite", "results", "out", "runs")  # fields that change no number


@dataclasses.dataclass(frozen=True)
class Options:
    """A grid of runs: every combination of the plural options is one cell.

    Attributes:
      models: names of `ModelConfig.name`.
      seeds: of parameters and training data; the test data are the same for all.
      learning_rates: at the end of the warm-up; the cosine ends at a hundredth.
      weight_decays: on matrices.
      chunks: tokens per write of the memories (`chunk_proj` and `chunk_mem`).
      steps: training steps, at most.
      batch_size: examples per step.
      warmup: steps of linear warm-up.
      clip: global norm of the gradient.
      eval_every: steps between evaluations.
      stop_at: stop once every score reaches this; none = never.
      dim: width of the model.
      layers: blocks.
      head_width: channels per head.
      parameters: fit every model to this many parameters (`match_parameters`); none = as the widths give.
      overrides: further fields of the model config, as key=value.
      tiny: small defaults that end in seconds and write below runs/.
      overwrite: compute cells again that have a record.
      results: folder of the records.
    """

    models: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    learning_rates: tuple[float, ...] = (3e-3,)
    weight_decays: tuple[float, ...] = (0.0,)
    chunks: tuple[int, ...] = (4,)
    steps: int = 1000
    batch_size: int = 32
    warmup: int = 50
    clip: float = 1.0
    eval_every: int = 100
    stop_at: float | None = None
    dim: int = 64
    layers: int = 2
    head_width: int = 16
    parameters: int | None = None
    overrides: tuple[str, ...] = ()
    tiny: bool = False
    overwrite: bool = False
    results: Path = RESULTS

    GRID: ClassVar[tuple[str, ...]] = ("models", "learning_rates", "weight_decays", "chunks", "seeds")
    KNOWN_MODELS: ClassVar[tuple[str, ...]] = tuple(ARCHITECTURES)
    COUNTS: ClassVar[tuple[str, ...]] = ("steps", "batch_size", "eval_every", "dim", "layers", "head_width")

    def __post_init__(self) -> None:
        for name in self.models:
            if name not in self.KNOWN_MODELS:
                raise UserError(unknown("model", name, list(self.KNOWN_MODELS)))
        at_least(self, dict.fromkeys(self.COUNTS, 1))


def at_least(options: Any, least: Mapping[str, int]) -> None:
    """Refuses an option below its least value.

    Raises:
      UserError: it names the option and its value.
    """
    for name, value in least.items():
        if getattr(options, name) < value:
            raise UserError(f"{name} must be at least {value}; got {getattr(options, name)}")


def from_command_line[T](cls: type[T], tiny: T, arguments: Sequence[str] | None = None) -> T:
    """The options of a command line; with --tiny the defaults are those of `tiny`.

    Raises:
      SystemExit: --help, or an option that does not parse or cannot be.
    """
    import tyro

    arguments = sys.argv[1:] if arguments is None else arguments
    default = tiny if "--tiny" in arguments else cls()
    return tyro.cli(cls, default=default, args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,))


def run_script[T](cls: type[T], tiny: T, run: Callable[[T, Console], Any]) -> None:
    """Runs with the options of the command line and prints what comes out; a mistake of the user ends in one line."""
    try:
        print(run(from_command_line(cls, tiny), Console()))
    except (UserError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


def cells[T: Options](options: T) -> Iterator[T]:
    """One `Options` per combination of the grid: each of its plural options has one entry.

    >>> [cell.seeds for cell in cells(Options(models=("hope",), seeds=(0, 1)))]
    [(0,), (1,)]
    """
    axes = [getattr(options, name) for name in options.GRID]
    for point in itertools.product(*axes):
        single = {name: (value,) for name, value in zip(options.GRID, point, strict=True)}
        yield dataclasses.replace(options, **single)


def settings(cell: Any) -> dict[str, Any]:
    """What decides the numbers of a cell, as plain values."""
    return {name: value for name, value in to_dict(cell).items() if name not in HOW_IT_RUNS}


def fingerprint(cell: Options) -> str:
    """Eight digits that differ when `settings` do.

    >>> fingerprint(Options(steps=2)) == fingerprint(Options(steps=2, overwrite=True)) != fingerprint(Options())
    True
    """
    return hashlib.sha256(json.dumps(settings(cell), sort_keys=True).encode()).hexdigest()[:8]


def command(experiment: str, cell: Any) -> str:
    """The command line that computes exactly this cell again.

    >>> command("mqar", Options(models=("hope",), steps=7, overrides=("exact=false",)))
    'python -m experiments.mqar --models hope --steps 7 --overrides exact=false'
    """
    default = type(cell)()
    words = ["python", "-m", f"experiments.{experiment}"]
    for name in settings(cell):
        value = getattr(cell, name)
        if value != getattr(default, name):
            items = value if isinstance(value, tuple) else (value,)
            words += ["--" + name.replace("_", "-"), *map(str, items)]
    return shlex.join(words)


def model_config(cell: Options, *, vocab_size: int, length: int, levels: int = 2, **fields: Any) -> ModelConfig:
    """The model of a cell, for sequences of up to `length` tokens; `fields` are what its task asks for.

    A CMS chain has `levels` levels.

    Blocks are recomputed in the backward pass because on a CPU that is faster than writing the states of memories out.
    Self-modifying memories with momentum start with a small step and clip their errors (experiments/LOG.md for both).

    Raises:
      UserError: the model refuses its config.
    """
    [name], [chunk] = cell.models, cell.chunks
    try:
        base = ModelConfig(
            name=name,
            vocab_size=vocab_size,
            dim=cell.dim,
            layers=cell.layers,
            heads=max(1, cell.dim // cell.head_width),
            memory_hidden=cell.head_width,
            chunk_proj=chunk,
            chunk_mem=chunk,
            cms_hidden=(2 * cell.dim,) * levels,
            max_length=length,
            tie_embeddings=False,
            remat="full",
            **(STEADY if name in ("hope", "self_modifying_titans") else {}),
            **fields,
        )
        config = apply_overrides(base, cell.overrides)
        check_sequence_length(config, length)
        return config if cell.parameters is None else match_parameters(config, cell.parameters)
    except ValueError as error:
        raise UserError(one_line(error)) from error
