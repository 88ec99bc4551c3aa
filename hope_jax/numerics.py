"""Roots and sizes with finite derivatives at zero, in float32 or wider; the rules and optimizers share them."""

from typing import Any

import jax
import jax.numpy as jnp


def wide(x: jax.Array) -> jax.Array:
    """x in float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def zeros_wide(x: jax.Array) -> jax.Array:
    """Zeros like x in float32 or wider: a sum of many small numbers would stop growing in bfloat16."""
    return jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32))


def safe_sqrt(x: jax.Array, at_zero: float = 0.0) -> jax.Array:
    """The square root of what is not negative; `at_zero` and derivative 0 at 0.

    Example:
        >>> x = jnp.array([4.0, 0.0])
        >>> safe_sqrt(x).tolist(), safe_sqrt(x, at_zero=1).tolist(), jax.grad(safe_sqrt)(0.0).item()
        ([2.0, 0.0], [2.0, 1.0], 0.0)
    """
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), at_zero).astype(x.dtype)


def frobenius(x: jax.Array) -> jax.Array:
    """Frobenius norm over the last two axes, [..., 1, 1]; 1 where it is zero, so that one can divide by it."""
    return safe_sqrt(jnp.sum(jnp.square(wide(x)), axis=(-2, -1), keepdims=True), at_zero=1)


def rms(x: jax.Array) -> jax.Array:
    """Root mean square over the last two axes, [..., 1, 1] (all axes of a vector); 1 where it is zero."""
    axes = tuple(range(-min(x.ndim, 2), 0))
    return safe_sqrt(jnp.mean(jnp.square(wide(x)), axis=axes, keepdims=True), at_zero=1)


def with_rms(x: jax.Array, size: Any, eps: Any) -> jax.Array:
    """Each matrix of x [..., K, V] scaled to a root mean square of `size`; eps is added to its own; zero stays zero."""
    return (size * wide(x) / (rms(x) + eps)).astype(x.dtype) if x.size else x
