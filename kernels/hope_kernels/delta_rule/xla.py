"""The chunked form in plain jax, for every platform: tiles of `block_t` tokens, one triangular solve in each."""

from functools import partial

import jax

from hope_kernels.delta_rule.config import default_block_t
from hope_kernels.delta_rule.tile import tile
from hope_kernels.delta_rule.types import Inputs, State
from hope_kernels.delta_rule.vjp import walk_tiles


def forward(inputs: Inputs, state: State, *, read: str, block_t: int | None) -> tuple[jax.Array | None, State]:
    """All tokens; a call of at most `block_t` of them is one tile, without padding and without a loop."""
    block_t = default_block_t(inputs.k.shape[1]) if block_t is None else block_t
    return walk_tiles(partial(_tile_over_heads, read), block_t, inputs, state)


def _tile_over_heads(read: str, inputs: Inputs, state: State) -> tuple[jax.Array | None, State]:
    """`tile` for arrays [B, C, H, ...] and states [B, H, K, V]."""
    heads = jax.vmap(partial(tile, read), in_axes=(1, 0), out_axes=(1, 0))
    return jax.vmap(heads)(inputs, state)
