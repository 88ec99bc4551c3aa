"""The chunked form in plain jax, for every platform: tiles of `block_t` tokens, one triangular solve in each."""

from functools import partial
from typing import Any

import jax

from hope_kernels.delta_rule.config import Config, default_block_t
from hope_kernels.delta_rule.tile import tile
from hope_kernels.delta_rule.types import Inputs, State, value_heads_per_key_head
from hope_kernels.delta_rule.vjp import walk_tiles


def forward(
    inputs: Inputs, state: State, *, read: str, config: Config, precision: str
) -> tuple[jax.Array | None, State]:
    """All tokens; a call of at most `block_t` of them is one tile, without padding and without a loop."""
    block_t = default_block_t(inputs.k.shape[1]) if config.block_t is None else config.block_t
    return walk_tiles(partial(_tile_over_heads, read, precision), block_t, inputs, state)


def _tile_over_heads(read: str, precision: str, inputs: Inputs, state: State) -> tuple[jax.Array | None, State]:
    """`tile` for arrays [B, C, H, ...], reset [B, C] and states [B, H, K, V]."""
    dtype, wide = inputs.k.dtype, state.s.dtype
    if precision == "high":
        inputs = jax.tree.map(lambda x: x.astype(wide), inputs)
    axes: Any = jax.tree.map(lambda _: 1, inputs)._replace(reset=None)
    run = partial(tile, read)
    group = value_heads_per_key_head(inputs)
    if group > 1:  # value heads of one key head: their scores are the same products
        run = jax.vmap(run, in_axes=(axes._replace(q=None, k=None), 0), out_axes=(1, 0))
        inputs, state = _split_heads(inputs, state, group)
    y, state = jax.vmap(jax.vmap(run, in_axes=(axes, 0), out_axes=(1, 0)))(inputs, state)
    if group > 1:
        state = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), state)
        y = None if y is None else y.reshape(*y.shape[:2], -1, y.shape[-1])
    return None if y is None else y.astype(dtype), state


def _split_heads(inputs: Inputs, state: State, group: int) -> tuple[Inputs, State]:
    """H = (Hk, group): arrays of value heads [B, C, H, ...] -> [B, C, Hk, group, ...], states likewise."""

    def split(x: jax.Array, axis: int) -> jax.Array:
        return x.reshape(*x.shape[:axis], -1, group, *x.shape[axis + 1 :])

    value_heads = {name: getattr(inputs, name) for name in ("u", "eta", "log_alpha", "log_mu", "mask")}
    value_heads = {name: None if x is None else split(x, 2) for name, x in value_heads.items()}
    return inputs._replace(**value_heads), jax.tree.map(lambda x: split(x, 1), state)
