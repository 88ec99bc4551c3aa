"""Named shapes of real calls, shared by tests and benchmarks, and random arguments for them."""

from typing import Any, NamedTuple

import jax
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


def _bfloat16(batch: int, tokens: int, heads: int, width: int = 128, **rest: Any) -> ArgSpec:
    return ArgSpec(batch, tokens, heads, width, width, dtype="bfloat16", **rest)


def _hope(rows: int, heads: int) -> dict[str, ArgSpec]:
    """The calls of one Hope layer on one device, by the last part of their name.

    The paper gives no widths, so they are the ones this library uses for its sizes (spec 8.3): heads of K = 64 in a
    residual stream of 64 H channels, memories with F = 64 hidden units, five of them on one clock of 16 tokens, with
    momentum, erase and decay. "chunk": one chunk of the nest, the first matrices of the five memories side by side,
    V = 5 F. "sequence": a matrix memory over a whole training sequence of 4,096 tokens.
    """
    return {
        "chunk": ArgSpec(rows, 16, heads, 64, 5 * 64, momentum=True),
        "sequence": _bfloat16(rows, 4096, heads, 64),
    }


# Rows are the sequences that a device holds on pods of the usual size; 140M: 12 layers of 768 channels, the Transformer
# that goes by that name, in heads of 64; 760M and 1.3B: 1,536 and 2,048 channels (spec 8.3).
_HOPE = {"140m": _hope(2, 12), "760m": _hope(4, 24), "1300m": _hope(4, 32)}

ARG_SPECS = {
    # Small enough for a CPU.
    "short": ArgSpec(1, 512, 4, 64, 64),
    "layer": ArgSpec(2, 2048, 4, 64, 64),
    "layer_momentum": ArgSpec(2, 2048, 4, 64, 64, momentum=True),
    "layer_linear_attention": ArgSpec(2, 2048, 4, 64, 64, erase=False, decay=False),
    "layer_bfloat16": ArgSpec(2, 2048, 4, 64, 64, dtype="bfloat16"),
    # One chunk of a nest: the memories of a self-modifying layer, four heads of each, stand in the batch axis.
    "chunk_of_16": ArgSpec(40, 16, 1, 64, 64),
    "chunk_of_4": ArgSpec(40, 4, 1, 64, 64),
    "one_token": ArgSpec(8, 1, 4, 64, 64),
    # For accelerators: batch, tokens, heads; K = V = 128 where nothing else is said.
    "b8_t4096_h16": _bfloat16(8, 4096, 16),
    "b1_t32768_h16": _bfloat16(1, 32768, 16),
    "b1_t32768_h8": _bfloat16(1, 32768, 8),
    "b4_t8192_h32": _bfloat16(4, 8192, 32),
    "b4_t8192_h64_grouped": _bfloat16(4, 8192, 64, key_heads=16),
    "b1_t32768_h32_packed": _bfloat16(1, 32768, 32, documents=8),
    "b8_t2048_h32_k256": _bfloat16(8, 2048, 32, 256),
    "b8_t4096_h32_k64": _bfloat16(8, 4096, 32, 64),
    # Hope's own calls.
    **{f"hope_{size}_{part}": spec for size, parts in _HOPE.items() for part, spec in parts.items()},
}


def argument_shapes(spec: ArgSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """What `make_arguments(spec)` has, by shape and dtype."""
    time_shape = (spec.batch, spec.tokens, spec.heads)
    key_shape = (spec.batch, spec.tokens, spec.key_heads or spec.heads, spec.key_width)
    state_shape = (spec.batch, spec.heads, spec.key_width, spec.value_width)
    gate_dtype = "float64" if spec.dtype == "float64" else "float32"
    gates = {"eta": spec.erase, "log_alpha": spec.decay, "log_mu": spec.momentum}
    shapes = {
        "q": (key_shape, spec.dtype),
        "k": (key_shape, spec.dtype),
        "u": ((*time_shape, spec.value_width), spec.dtype),
        "initial_state": (state_shape, gate_dtype),
        **{name: (time_shape, gate_dtype) for name, present in gates.items() if present},
    }
    if spec.momentum:
        shapes["initial_momentum"] = (state_shape, gate_dtype)
    if spec.documents > 1:
        shapes["segment_ids"] = ((spec.batch, spec.tokens), "int32")
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


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
