"""Named shapes of real calls, shared by tests and benchmarks, and random arguments for them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class ArgSpec(NamedTuple):
    """Shapes, the clock, and the gates that are present."""

    batch: int
    tokens: int
    heads: int
    width: int
    hidden: int
    chunk_size: int
    decay: bool = True
    momentum: bool = True
    dtype: str = "float32"


ARG_SPECS = {
    "layer": ArgSpec(1, 512, 4, 64, 64, 16),
    "layer_without_momentum": ArgSpec(1, 512, 4, 64, 64, 16, momentum=False),
    "wide_chunks": ArgSpec(1, 512, 4, 64, 64, 64),
}

# The long-term memory module of Titans: gradient descent with momentum and forgetting.
TITANS: dict[str, Any] = {"decay": False, "exact": False}


def make_arguments(spec: ArgSpec, seed: int = 0) -> dict[str, jax.Array]:
    """Order-one data: keys of unit norm, eta in (0, 0.3), alpha in (0.9, 1), mu in (0.3, 0.95)."""
    rng = np.random.default_rng(seed)
    gate_dtype = "float64" if spec.dtype == "float64" else "float32"
    time_shape = (spec.batch, spec.tokens, spec.heads)
    shape1, shape2 = ((spec.batch, spec.heads, *s) for s in ((spec.hidden, spec.width), (spec.width, spec.hidden)))

    def normal(shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(scale * rng.normal(size=shape), dtype)

    k = rng.normal(size=(*time_shape, spec.width))
    arguments = {
        "q": normal(k.shape, spec.dtype),
        "k": jnp.asarray(k / np.linalg.norm(k, axis=-1, keepdims=True), spec.dtype),
        "v": normal(k.shape, spec.dtype, 0.5),
        "eta": jnp.asarray(rng.uniform(0.0, 0.3, time_shape), gate_dtype),
        "w1": normal(shape1, gate_dtype, 0.5 / spec.hidden**0.5),
        "w2": normal(shape2, gate_dtype, 1 / spec.width**0.5),
    }
    if spec.decay:
        arguments["log_alpha"] = jnp.asarray(np.log(rng.uniform(0.9, 1.0, time_shape)), gate_dtype)
    if spec.momentum:
        arguments["log_mu"] = jnp.asarray(np.log(rng.uniform(0.3, 0.95, time_shape)), gate_dtype)
        arguments["momentum1"] = normal(shape1, gate_dtype, 0.1 / spec.hidden**0.5)
        arguments["momentum2"] = normal(shape2, gate_dtype, 0.1 / spec.width**0.5)
    return arguments
