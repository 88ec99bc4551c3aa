"""A trained run as something to use: the program on one device and the latest state."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from hope_jax.models import Pretrained
from hope_jax.training.checkpoint import Checkpoints, fingerprints, saved_step
from hope_jax.training.config import MeshConfig, TrainConfig, read_config
from hope_jax.training.errors import UserError
from hope_jax.training.run_dir import read_corpus_facts
from hope_jax.training.step import Program, TrainState, build_program


class Run(NamedTuple):
    """A run that was read back."""

    config: TrainConfig
    program: Program
    state: TrainState


def load_run(run_dir: Path) -> Run:
    """Reads config and latest checkpoint of a run, onto one device whatever mesh it was trained on.

    Raises:
      UserError: there is no run, or no checkpoint.
    """
    config = dataclasses.replace(read_config(run_dir), mesh=MeshConfig())
    program = build_program(config)
    if saved_step(run_dir) is None:
        raise UserError(f"{run_dir} holds no checkpoint yet; train it to its first one")
    with Checkpoints(run_dir, read_only=True) as checkpoints:
        expected = fingerprints(config, read_corpus_facts(run_dir)["sha256"])
        state, _ = checkpoints.restore(program.abstract_state, expected)
    return Run(config, program, state)


def load_pretrained(run_dir: Path | str) -> Pretrained:
    """The model of a run: `(config, params)`, for example for `hope_jax.models.stack_levels`.

    Raises:
      UserError: there is no run, or no checkpoint.
    """
    run = load_run(Path(run_dir))
    return Pretrained(run.config.model, run.state.params)
