"""The delta rule on TPU: a fused forward kernel and a backward kernel; see the README of this folder."""

from typing import Any

import jax
import jax.numpy as jnp

from hope_kernels.delta_rule.config import Config
from hope_kernels.delta_rule.pallas_tpu import choose, vjp
from hope_kernels.delta_rule.types import Inputs, State


def forward(
    inputs: Inputs, state: State, *, read: str, config: Config, precision: str
) -> tuple[jax.Array | None, State]:
    """Reads [B, T, H, V] and the final state; any T >= 1."""
    plan = choose.plan_call(inputs, read, config, precision)
    batch, tokens, heads, width = inputs.u.shape
    missing = plan.tokens - tokens

    def lay_out(x: jax.Array) -> jax.Array:
        """Heads side by side, and tokens that do nothing behind the last one."""
        x = x.reshape(batch, tokens, -1) if x.ndim == 4 else x
        return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x

    result: Any = vjp.delta_rule(plan, jax.tree.map(lay_out, inputs), state.s)
    y, end = result
    y = None if y is None else y[:, :tokens].reshape(batch, tokens, heads, width)
    return y, State(end, None)


def cannot_run(inputs: Inputs, state: State, *, read: str, config: Config, precision: str) -> str | None:
    """Why this call is not for these kernels, as one phrase, or None."""
    del state, read, precision
    return choose.cannot_run(inputs, config)


def unsuited(inputs: Inputs, state: State, *, read: str, config: Config, precision: str) -> str | None:
    """Why another implementation should be chosen although this one can run, or None."""
    del state, read, config, precision
    return choose.unsuited(inputs)
