"""The chunked form in plain jax, for every platform: all tokens of a chunk at once, chunks one after another."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from hope_kernels.mlp_memory.chunk import chunk
from hope_kernels.mlp_memory.types import Inputs, Options, State
from hope_kernels.mlp_memory.vjp import walk


def forward(
    options: Options, chunk_size: int, group: int | None, inputs: Inputs, state: State
) -> tuple[jax.Array | None, State]:
    """All tokens; what is missing to whole chunks and whole groups is filled up with tokens that do nothing."""
    tokens = inputs.k.shape[1]
    chunks = -(-tokens // chunk_size)
    group = default_group(chunks) if group is None else min(group, chunks)
    padded = -(-chunks // group) * group * chunk_size
    if inputs.log_mu is not None and inputs.mask is None and padded > tokens:
        inputs = inputs._replace(mask=jnp.ones_like(inputs.log_mu))
    split = jax.tree.map(lambda x: split_chunks(x, chunk_size, padded), inputs)
    out: tuple[jax.Array | None, State] = walk(jax.vmap(partial(chunk, options)), group, split, state)
    y, end = out
    return None if y is None else join_chunks(y)[:, :tokens], end


def default_group(chunks: int) -> int:
    """Chunks between two states that are kept: near the square root, which holds the fewest, and a divisor if any."""
    root = math.isqrt(chunks)
    near = range(max(root // 2, 1), 2 * root + 1)
    return min(near, key=lambda group: (-chunks % group, chunks // group + group))


def split_chunks(x: jax.Array, chunk_size: int, padded: int) -> jax.Array:
    """[B, T, H, ...] -> [N, B, H, C, ...], zeros after the last token."""
    x = jnp.pad(x, [(0, 0), (0, padded - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, chunk_size, *x.shape[2:])
    return jnp.moveaxis(x, (0, 1, 2, 3), (1, 0, 3, 2))


def join_chunks(y: jax.Array) -> jax.Array:
    """The inverse of `split_chunks`: [N, B, H, C, K] -> [B, T, H, K]."""
    y = jnp.moveaxis(y, (0, 1, 2, 3), (1, 0, 3, 2))
    return y.reshape(y.shape[0], -1, *y.shape[3:])
