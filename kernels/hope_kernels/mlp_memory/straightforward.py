"""The base that the benchmark compares with: a `jax.checkpoint` around every chunk, and jax differentiates the walk.

It is correct for what the benchmark measures (whole chunks, no mask, reads at the start of a chunk) and is no
implementation of the operation.
"""

from functools import partial
from typing import Any

import jax

from hope_kernels.mlp_memory.arg_specs import ArgSpec
from hope_kernels.mlp_memory.chunk import chunk
from hope_kernels.mlp_memory.types import Inputs, MLPMemoryOutput, Options, State, Weights
from hope_kernels.mlp_memory.xla import join_chunks, split_chunks


def why_not(spec: ArgSpec) -> str | None:
    """Why `spec` is not for it, as one phrase, or None."""
    if spec.tokens % spec.chunk_size:
        return f"it takes whole chunks; there are {spec.tokens} tokens in chunks of {spec.chunk_size}"
    return None


def checkpointed(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    eta: jax.Array,
    w1: jax.Array,
    w2: jax.Array,
    *,
    chunk_size: int,
    log_alpha: jax.Array | None = None,
    log_mu: jax.Array | None = None,
    momentum1: jax.Array | None = None,
    momentum2: jax.Array | None = None,
    **options: Any,
) -> MLPMemoryOutput:
    """As `mlp_memory`, for weights, momenta and gates in float32.

    Reference: spec (S7.4)-(S7.7); the README of this folder.
    """
    momentum = None if log_mu is None else Weights(momentum1, momentum2)
    inputs = Inputs(q, k, v, eta, log_alpha, log_mu, mask=None)
    chunks = jax.tree.map(lambda x: split_chunks(x, chunk_size, x.shape[1]), inputs)
    # Between the steps of a scan there is nothing to merge what is computed again with.
    one = jax.checkpoint(jax.vmap(partial(chunk, Options(**options))), prevent_cse=False)
    end, y = jax.lax.scan(lambda state, x: one(x, state)[::-1], State(Weights(w1, w2), momentum), chunks)
    z1, z2 = (None, None) if end.momentum is None else end.momentum
    return MLPMemoryOutput(join_chunks(y), end.weights.w1, end.weights.w2, z1, z2)
