"""A model against a parameter-matched one of another architecture, on the same bytes in the same order."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from hope_jax.models import ARCHITECTURES, count_parameters, match_parameters
from hope_jax.training.architecture import architecture_changes
from hope_jax.training.config import TrainConfig, segment_length
from hope_jax.training.distributed import is_primary
from hope_jax.training.errors import UserError
from hope_jax.training.loop import Result, train
from hope_jax.training.overrides import one_line
from hope_jax.training.plots import plot_loss
from hope_jax.training.progress import table
from hope_jax.training.run_dir import LOSS_PLOT, VERSUS

OTHERS = tuple(ARCHITECTURES)


def opponent(config: TrainConfig, name: str) -> TrainConfig:
    """The same run with another architecture of as many parameters (within 1%).

    Documents begin where they may begin for both; it reads what `comparable(config, name)` reads.

    Raises:
      UserError: the run has that architecture already or begins from another run, no width matches, or the other model
        cannot read these windows.
    """
    if config.start.run:
        raise UserError(
            f"--versus {name} trains another architecture from random parameters, this run begins from "
            f"{config.start.run}; leave --versus out"
        )
    if config.model.name == name:
        raise UserError(f"--versus {name} compares another model with {name}; choose one with model=NAME")
    changes = architecture_changes(config.model, name) | {"max_length": max(config.model.max_length, config.seq_len)}
    if name == "transformer":
        changes["remat"] = "none"  # the fastest policy of attention: its speed is what ours is compared with
    try:
        model = match_parameters(dataclasses.replace(config.model, **changes), count_parameters(config.model))
    except ValueError as error:
        raise UserError(one_line(error)) from error
    multiple = config.document_multiple
    if config.documents in ("reset", "carry_reset"):
        multiple = math.lcm(config.segment, segment_length(model))
    periods = config.cms_periods if model.has_cms else ()
    return dataclasses.replace(config, model=model, cms_periods=periods, document_multiple=multiple)


def comparable(config: TrainConfig, name: str) -> TrainConfig:
    """The run as it is trained beside another architecture: documents begin where they may begin for both.

    Raises:
      UserError: see `opponent`; or the windows are no multiple of what both models read at once.

    >>> from hope_jax.models import ModelConfig
    >>> ours = TrainConfig(seq_len=96, documents="reset", model=ModelConfig(chunk_proj=24, chunk_mem=24))
    >>> comparable(ours, "transformer").segment, opponent(ours, "transformer").segment
    (24, 24)
    """
    multiple = opponent(config, name).document_multiple
    same = multiple in (config.document_multiple, config.segment)
    return config if same else dataclasses.replace(config, document_multiple=multiple)


def train_opponent(ours: Result, name: str, *, resume: bool | None, overwrite: bool, console: Console) -> Result:
    """Trains the other model below the run it is compared with, and draws both into that run's loss.png."""
    run_dir = opponent_dir(ours.run_dir, name)
    resume = None if resume else resume
    theirs = train(opponent(ours.config, name), run_dir, resume=resume, overwrite=overwrite, console=console)
    if is_primary():
        plot_loss({ours.config.model.name: ours.run_dir, name: run_dir}, ours.run_dir / LOSS_PLOT)
    return theirs


def opponent_dir(run_dir: Path, name: str) -> Path:
    """Where the other model's run lies."""
    return run_dir / VERSUS / name


def comparison(ours: Result, theirs: Result):
    """The table of both: parameters, validation bits per byte, tokens per second, ratio of the speeds."""
    return table("Validation, same bytes in the same order", _rows(ours, theirs))


def _rows(ours: Result, theirs: Result) -> Mapping[str, Mapping[str, str]]:
    base = theirs.tokens_per_second
    return {
        result.config.model.name: {
            "parameters": f"{result.parameters:,}",
            "bits per byte": f"{result.validation_bpb:.3f}",
            "tokens/s": _number(result.tokens_per_second, ",.0f"),
            "speed": _number(result.tokens_per_second and base and result.tokens_per_second / base, ".2f"),
        }
        for result in (ours, theirs)
    }


def _number(value: float | None, form: str) -> str:
    return "-" if not value else format(value, form)
