"""A trained run as something to use: the program on one device and the latest state."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from hope_jax.training.checkpoint import Checkpoints
from hope_jax.training.config import MeshConfig, TrainConfig, read_config
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
    with Checkpoints(run_dir, config.keep_checkpoints) as checkpoints:
        state, _ = checkpoints.restore(program.abstract_state)
    return Run(config, program, state)
