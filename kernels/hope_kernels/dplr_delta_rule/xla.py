"""The chunked form in plain jax, for every platform: tiles of `block_t` tokens, one triangular solve in each.

For the gradient the inputs and the states at the starts of the tiles are kept, and a tile is computed again when its
turn comes. The states have a name, so that a `jax.checkpoint` policy can say whether they are saved or not.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hope_kernels.dplr_delta_rule.tile import tile
from hope_kernels.dplr_delta_rule.types import Inputs

BLOCK_T = 32  # tokens per tile
STATES = "dplr_delta_rule_states"  # name of the tile-start states, for `jax.checkpoint` policies


def forward(inputs: Inputs, state: jax.Array, *, read: str, block_t: int | None) -> tuple[jax.Array | None, jax.Array]:
    """All tokens; the last tile is filled up with tokens that do nothing."""
    tokens = inputs.k.shape[1]
    block_t = min(block_t or BLOCK_T, tokens)
    # The body of a scan is not merged with its own recomputation: no barrier is needed against that.
    over_heads = jax.checkpoint(jax.vmap(jax.vmap(partial(tile, read))), prevent_cse=False)

    def step(s: jax.Array, inputs_n: Inputs) -> tuple[jax.Array, jax.Array | None]:
        y_n, s = over_heads(inputs_n, checkpoint_name(s, STATES))
        return s, y_n

    state, y = jax.lax.scan(step, state, jax.tree.map(partial(_split, block_t), inputs))
    if y is not None:
        y = jnp.moveaxis(y, (0, 1, 2, 3), (1, 0, 3, 2))  # [N, B, H, C, V] -> [B, N, C, H, V]
        y = y.reshape(y.shape[0], -1, *y.shape[3:])[:, :tokens]
    return y, state


def _split(block_t: int, x: jax.Array) -> jax.Array:
    """[B, T, H, ...] -> [N, B, H, C, ...], zeros after the last token."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % block_t)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, block_t, *x.shape[2:])
    return jnp.moveaxis(x, (0, 1, 2, 3), (1, 0, 3, 2))
