"""RMSNorm over the last axis, or over each head's share of it."""

import jax
import jax.numpy as jnp
from flax import nnx


def rms_normalise(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """`x / sqrt(mean(x^2) + epsilon)` over the last axis, in at least float32, then back to x's dtype."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_normalise(x) * scale`, with the last axis cut into `groups` that are normalised separately."""

    def __init__(self, dim: int, *, groups: int = 1, epsilon: float = 1e-6):
        self.groups, self.epsilon = groups, epsilon
        self.scale = nnx.Param(jnp.ones(dim, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        cut = x.reshape(*x.shape[:-1], self.groups, -1)
        scale = self.scale[...].astype(x.dtype)
        return jnp.einsum("...d,d->...d", rms_normalise(cut, self.epsilon).reshape(x.shape), scale)
