"""Levels outside the sequence: clocks for the outer optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hope_jax.types import Params


class EveryState(NamedTuple):
    pending: Params  # like the updates: their sum since the last step
    count: jax.Array  # int32[]: calls since the last step; the next one is due in k - count calls
    inner: optax.OptState


def _cast(x: Any, like: Any) -> jax.Array:
    return x if jnp.asarray(x).dtype == like.dtype else jnp.asarray(x).astype(like.dtype)


def every(k: int, tx: optax.GradientTransformation, reduce: str = "sum") -> optax.GradientTransformationExtraArgs:
    """A level whose chunk is k optimizer steps: accumulate k updates, then step `tx` once on them.

    In between the update is zero and `tx` is not computed (`lax.cond`). `every(1, tx)` is `tx`. Extra arguments
    go to `tx` as they come with the k-th call.

    Args:
        k: calls per step of `tx`, at least 1.
        tx: the level's rule.
        reduce: "sum" (paper (71)) or "mean" of the k updates.

    Raises:
        ValueError: k below 1 or an unknown reduction.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx, w = every(2, optax.sgd(1.0)), jnp.zeros(1)
        >>> u, state = tx.update(jnp.ones(1), tx.init(w), w)
        >>> u.tolist(), tx.update(jnp.ones(1), state, w)[0].tolist()
        ([0.0], [-2.0])

    Reference: paper (71) for a level slower than a training step; spec 4.9.
    """
    if k < 1:
        raise ValueError(f"every(k, tx) needs k >= 1 steps; got {k}")
    if reduce not in ("sum", "mean"):
        raise ValueError(f'every reduces by "sum" or "mean"; got {reduce!r}')
    tx = optax.with_extra_args_support(tx)
    if k == 1:
        return tx

    def init(params: Params) -> EveryState:
        return EveryState(jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32), tx.init(params))

    def update(updates: Any, state: Any, params: Params = None, **extra: Any):
        pending = jax.tree.map(lambda a, g: (a + g).astype(a.dtype), state.pending, updates)

        def step() -> tuple[Any, EveryState]:
            total = pending if reduce == "sum" else jax.tree.map(lambda g: g / k, pending)
            new, inner = tx.update(total, state.inner, params, **extra)
            new, inner = jax.tree.map(_cast, (new, inner), (updates, state.inner))
            return new, EveryState(jax.tree.map(jnp.zeros_like, pending), jnp.zeros_like(state.count), inner)

        def wait() -> tuple[Any, EveryState]:
            return jax.tree.map(jnp.zeros_like, updates), EveryState(pending, state.count + 1, state.inner)

        return jax.lax.cond(state.count + 1 == k, step, wait)

    return optax.GradientTransformationExtraArgs(init, update)
