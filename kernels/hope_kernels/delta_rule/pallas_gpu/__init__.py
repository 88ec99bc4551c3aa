"""The delta rule on Hopper GPUs: four Mosaic GPU kernels; see the README of this folder."""

from typing import Any

import jax
import jax.numpy as jnp

from hope_kernels.delta_rule.config import Config
from hope_kernels.delta_rule.pallas_gpu import choose
from hope_kernels.delta_rule.types import Inputs, State


def forward(
    inputs: Inputs, state: State, *, read: str, config: Config, precision: str
) -> tuple[jax.Array | None, State]:
    """Reads [B, T, H, V] and the final state; any T >= 1."""
    from hope_kernels.delta_rule.pallas_gpu import vjp  # Mosaic GPU is imported when it is used: slow, needs absl-py

    tokens = inputs.k.shape[1]
    missing = -tokens % choose.TILE

    def fill_up(x: jax.Array) -> jax.Array:
        """Tokens that do nothing behind the last one."""
        return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x

    plan = choose.plan_call(inputs, read, config, precision)
    result: Any = vjp.delta_rule(plan, jax.tree.map(fill_up, inputs), state.s)
    y, end = result
    return None if y is None else y[:, :tokens], State(end, None)


def segments(inputs: Inputs) -> int:
    """Into how many segments a sequence is cut that alone would leave most of the chip idle."""
    return choose.segments(inputs)


def cannot_run(inputs: Inputs, state: State, *, read: str, config: Config, precision: str) -> str | None:
    """Why this call is not for these kernels, as one phrase, or None."""
    del state, read
    return choose.cannot_run(inputs, config, precision)


def unsuited(inputs: Inputs, state: State, *, read: str, config: Config, precision: str) -> str | None:
    """Why another implementation is chosen although this one can run."""
    del inputs, state, read, config, precision
    return "it has only been simulated and compiled, never run on a GPU"
