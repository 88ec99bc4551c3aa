"""`vmap` of a kernel: the mapped axis becomes part of the batch, and fills the kernel's cells like any batch entry."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def in_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose arrays all begin with the batch; under `vmap` the mapped axis becomes part of it."""
    run = jax.custom_batching.custom_vmap(function)

    @run.def_vmap
    def _rule(size: int, mapped: Any, *arguments: Any) -> tuple[Any, Any]:
        def fold(x: jax.Array, is_mapped: bool) -> jax.Array:
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = run(*jax.tree.map(fold, arguments, tuple(mapped)))
        results = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return run
