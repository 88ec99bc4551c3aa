"""Tokens per second of one self-modifying Titans layer: all memories residual two-layer MLPs, one example."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hope_jax import SelfModifyingConfig, self_modifying


def layer(
    length: int = 512, dim: int = 256, heads: int = 4, hidden: int = 64, chunk: int = 16, remat: bool = True
) -> tuple[Callable[[Any], Any], Callable[[Any], Any], Any]:
    """Forward and forward+backward (gradients of all parameters and of the input) as functions of one argument."""
    config = SelfModifyingConfig(
        dim=dim, heads=heads, memory_hidden=hidden, chunk_proj=chunk, chunk_mem=chunk, remat=remat
    )
    sm = self_modifying(config)
    params = sm.init(jax.random.key(0))
    r_TD = jax.random.normal(jax.random.key(1), (length, dim))

    def forward(args: Any) -> jax.Array:
        params, r_TD = args
        return sm.apply(params, sm.init_state(params), r_TD, phase=0)[1]

    def both(args: Any) -> Any:
        return jax.grad(lambda args: jnp.sum(jnp.sin(forward(args))))(args)

    return forward, both, (params, r_TD)
