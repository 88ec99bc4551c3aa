"""Named shapes of real calls, shared by tests and benchmarks, and random arguments for them."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class ArgSpec(NamedTuple):
    """Shapes and the gates that are present."""

    batch: int
    tokens: int
    heads: int
    key_width: int
    value_width: int
    erase: bool = True
    decay: bool = True
    momentum: bool = False
    dtype: str = "float32"
    key_heads: int | None = None  # Hk; None is as many as heads
    documents: int = 1  # packed into every row, of random lengths


ARG_SPECS = {
    "layer": ArgSpec(2, 2048, 4, 64, 64),
    "layer_momentum": ArgSpec(2, 2048, 4, 64, 64, momentum=True),
    "layer_linear_attention": ArgSpec(2, 2048, 4, 64, 64, erase=False, decay=False),
    "layer_bfloat16": ArgSpec(2, 2048, 4, 64, 64, dtype="bfloat16"),
    # One chunk of a nest: the memories of a self-modifying layer, four heads of each, stand in the batch axis.
    "chunk_of_16": ArgSpec(40, 16, 1, 64, 64),
    "chunk_of_4": ArgSpec(40, 4, 1, 64, 64),
    "one_token": ArgSpec(8, 1, 4, 64, 64),
}


def make_arguments(spec: ArgSpec, seed: int = 0) -> dict[str, Any]:
    """Order-one data with keys of unit norm, erase in (0, 0.9), alpha in (0.9, 1), mu in (0.3, 0.95)."""
    rng = np.random.default_rng(seed)
    time_shape = (spec.batch, spec.tokens, spec.heads)
    state_shape = (spec.batch, spec.heads, spec.key_width, spec.value_width)
    gate_dtype = "float64" if spec.dtype == "float64" else "float32"
    k = rng.normal(size=(spec.batch, spec.tokens, spec.key_heads or spec.heads, spec.key_width))
    arguments = {
        "q": jnp.asarray(rng.normal(size=k.shape), spec.dtype),
        "k": jnp.asarray(k / np.linalg.norm(k, axis=-1, keepdims=True), spec.dtype),
        "u": jnp.asarray(rng.normal(size=(*time_shape, spec.value_width)), spec.dtype),
        "initial_state": jnp.asarray(rng.normal(size=state_shape), gate_dtype),
    }
    if spec.erase:
        arguments["eta"] = jnp.asarray(rng.uniform(0.0, 0.9, time_shape), gate_dtype)
    if spec.decay:
        arguments["log_alpha"] = jnp.asarray(np.log(rng.uniform(0.9, 1.0, time_shape)), gate_dtype)
    if spec.momentum:
        arguments["log_mu"] = jnp.asarray(np.log(rng.uniform(0.3, 0.95, time_shape)), gate_dtype)
        arguments["initial_momentum"] = jnp.asarray(rng.normal(size=state_shape), gate_dtype)
    if spec.documents > 1:
        starts = rng.integers(1, spec.tokens, (spec.batch, spec.documents - 1))
        arguments["segment_ids"] = jnp.asarray((np.arange(spec.tokens)[None, :, None] >= starts[:, None, :]).sum(-1))
    return arguments
