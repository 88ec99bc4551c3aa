"""Named shapes of real calls, shared by tests and benchmarks, and random arguments for them."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class ArgSpec(NamedTuple):
    """Shapes."""

    batch: int
    tokens: int
    heads: int
    key_width: int
    value_width: int
    dtype: str = "float32"
    documents: int = 1  # packed into every row, of random lengths


ARG_SPECS = {
    # Small enough for a CPU.
    "short": ArgSpec(1, 512, 4, 64, 64),
    "layer": ArgSpec(2, 2048, 4, 64, 64),
    "layer_bfloat16": ArgSpec(2, 2048, 4, 64, 64, dtype="bfloat16"),
    # For accelerators: RWKV-7 of 2,048 channels has 32 heads of 64.
    "b8_t4096_h32_k64": ArgSpec(8, 4096, 32, 64, 64, dtype="bfloat16"),
    "b8_t4096_h16_k128": ArgSpec(8, 4096, 16, 128, 128, dtype="bfloat16"),
}


def make_arguments(spec: ArgSpec, seed: int = 0) -> dict[str, Any]:
    """Order-one data as a layer has it: alpha in (0.6, 1), c of unit norm, b = rate * c with rates in (0, 1)."""
    rng = np.random.default_rng(seed)
    wide = "float64" if spec.dtype == "float64" else "float32"
    keys = (spec.batch, spec.tokens, spec.heads, spec.key_width)
    c = rng.normal(size=keys)
    c /= np.linalg.norm(c, axis=-1, keepdims=True)
    arguments = {
        "q": jnp.asarray(rng.normal(size=keys), spec.dtype),
        "k": jnp.asarray(rng.normal(size=keys) / spec.key_width**0.5, spec.dtype),
        "u": jnp.asarray(rng.normal(size=(*keys[:3], spec.value_width)), spec.dtype),
        "b": jnp.asarray(rng.uniform(0.0, 1.0, keys) * c, spec.dtype),
        "c": jnp.asarray(c, spec.dtype),
        "log_alpha": jnp.asarray(np.log(rng.uniform(0.6, 1.0, keys)), wide),
        "initial_state": jnp.asarray(rng.normal(size=(spec.batch, spec.heads, spec.key_width, spec.value_width)), wide),
    }
    if spec.documents > 1:
        starts = rng.integers(1, spec.tokens, (spec.batch, spec.documents - 1))
        arguments["segment_ids"] = jnp.asarray((np.arange(spec.tokens)[None, :, None] >= starts[:, None, :]).sum(-1))
    return arguments
