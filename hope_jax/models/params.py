"""Making and using weight matrices: float32 normal values, cast to the activations' dtype at use."""

import jax
import jax.numpy as jnp
from flax import nnx


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> nnx.Param:
    """A parameter drawn from N(0, scale^2) in float32."""
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape, jnp.float32))


def matrix(rngs: nnx.Rngs, fan_in: int, fan_out: int, gain: float = 1.0) -> nnx.Param:
    """A `[fan_in, fan_out]` matrix from N(0, gain^2 / fan_in): unit inputs give outputs of scale `gain`."""
    return normal(rngs, (fan_in, fan_out), gain * fan_in**-0.5)


def matmul(x: jax.Array, weight: nnx.Param) -> jax.Array:
    """`x @ weight` in the dtype of `x`; the stored weight stays in its own dtype."""
    return x @ weight[...].astype(x.dtype)
