"""Compiles the training step of a small Hope model for the TPUs it is given, divided as the rule table says.

A program of its own: the TPU compiler wants its environment before it is loaded. It prints which kernels' calls got
what, then "compiled".
"""

import sys

import jax
import jax.numpy as jnp

from hope_jax.models import ModelConfig
from hope_jax.placement import on_mesh
from hope_jax.training.config import TrainConfig
from hope_jax.training.optimizer import build_optimizer
from hope_jax.training.overrides import apply_overrides
from hope_jax.training.shard_report import topology_devices
from hope_jax.training.step import build_program, make_train_step
from hope_kernels import explain

# Heads of 64 that are written every 64 tokens: what `pallas_tpu` takes.
MODEL = ModelConfig(
    name="hope",
    dim=128,
    layers=1,
    heads=2,
    memory_hidden=64,
    chunk_proj=64,
    chunk_mem=64,
    momentum=None,
    cms_hidden=(128, 128),
    max_length=128,
)


def main(topology: str, *overrides: str) -> None:
    config = apply_overrides(TrainConfig(model=MODEL, steps=20, batch_size=8, seq_len=128, warmup_steps=4), overrides)
    program = build_program(config, topology_devices(topology))
    tokens = jax.ShapeDtypeStruct((8, 129), jnp.uint8, sharding=program.batch_sharding)
    step = on_mesh(make_train_step(program.lm, build_optimizer(config), config), program.mesh)
    with jax.default_device(program.mesh.devices.flat[0]):
        print(explain(step, program.abstract_state, tokens))
        program.train_step.lower(program.abstract_state, tokens).compile()
    print("compiled")


if __name__ == "__main__":
    main(*sys.argv[1:])
