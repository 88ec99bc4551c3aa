"""Compiles the training step of a small Hope model for the TPUs it is given, divided as the rule table says.

A program of its own: the TPU compiler wants its environment before it is loaded. It prints which kernels' calls got
what, then "compiled".
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from hope_jax.models import ModelConfig, build_lm
from hope_jax.training.config import TrainConfig
from hope_jax.training.optimizer import build_optimizer
from hope_jax.training.sharding import BATCH, shardings
from hope_jax.training.step import init_state, make_train_step
from hope_kernels import aot, explain

# Heads of 64 that are written every 64 tokens: what `pallas_tpu` takes on a single device.
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


def main(topology: str, axes: str) -> None:
    mesh = aot.mesh(topology, json.loads(axes))
    config = TrainConfig(model=MODEL, steps=20, batch_size=8, seq_len=128, warmup_steps=4)
    lm, tx = build_lm(MODEL), build_optimizer(config)
    state = jax.eval_shape(lambda: init_state(lm, tx, 0))
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings(state, mesh))
    tokens = jax.ShapeDtypeStruct((8, 129), jnp.uint8, sharding=NamedSharding(mesh, BATCH))
    step = make_train_step(lm, tx, config)
    with jax.default_device(mesh.devices.flat[0]):
        print(explain(step, state, tokens))
        jax.jit(step).lower(state, tokens).compile()
    print("compiled")


if __name__ == "__main__":
    main(*sys.argv[1:])
