"""The gradient of a tiled form: inputs and tile-start states are kept, everything else is computed again.

The states have a name, so that a `jax.checkpoint` policy can say whether they are saved or computed again. The tiles
are walked backwards with the cotangent of the state; each is differentiated by itself. Doing this for all tiles at
once, or writing the closed form of (S5.5) by hand, was not faster on a CPU (README, "What was measured").
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hope_kernels.delta_rule.types import Inputs, State

STATES = "delta_rule_states"  # name of the tile-start states, for `jax.checkpoint` policies

type Reads = jax.Array | None  # [B, T, H, V]
type Tile = Callable[[Inputs, State], tuple[Reads, State]]  # arrays [B, C, H, ...], states [B, H, K, V]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def walk_tiles(tile: Tile, block_t: int, inputs: Inputs, state: State) -> tuple[Reads, State]:
    """`tile` over `block_t` tokens at a time, the state handed on; inputs [B, T, H, ...], T at least 1."""
    return _forward(tile, block_t, inputs, state)[0]


def _forward(tile, block_t, inputs, state):
    tokens = inputs.k.shape[1]
    if tokens <= block_t:
        return tile(inputs, state), (inputs, state)

    def step(start: State, inputs_n: Inputs):
        y_n, end = tile(inputs_n, start)
        return end, (y_n, start)

    end, (y, starts) = jax.lax.scan(step, state, tiles(inputs, block_t))
    starts = checkpoint_name(starts, STATES)
    return (None if y is None else join(y, tokens), end), (inputs, starts)


def _backward(tile, block_t, saved, cotangents):
    inputs, starts = saved
    tokens = inputs.k.shape[1]
    if tokens <= block_t:
        return jax.vjp(tile, inputs, starts)[1](cotangents)

    def step(d_end: State, xs):
        inputs_n, start, dy_n = xs
        d_inputs, d_start = jax.vjp(tile, inputs_n, start)[1]((dy_n, d_end))
        return d_start, d_inputs

    dy, d_end = cotangents
    dy = None if dy is None else _split(dy, block_t)
    d_start, d_tiles = jax.lax.scan(step, d_end, (tiles(inputs, block_t), starts, dy), reverse=True)
    d_inputs = jax.tree.map(lambda x: join(x, tokens), d_tiles)
    return d_inputs._replace(mask=None if inputs.mask is None else d_inputs.mask), d_start


walk_tiles.defvjp(_forward, _backward)


def tiles(inputs: Inputs, block_t: int) -> Inputs:
    """Inputs [B, T, H, ...] as tiles [N, B, C, H, ...]; the tokens that fill up the last one do nothing."""
    if inputs.log_mu is not None and inputs.mask is None and inputs.k.shape[1] % block_t:
        inputs = inputs._replace(mask=jnp.ones_like(inputs.log_mu))
    return jax.tree.map(lambda x: _split(x, block_t), inputs)


def _split(x: jax.Array, block_t: int) -> jax.Array:
    """[B, T, ...] -> [N, B, C, ...], zeros after the last token."""
    missing = -x.shape[1] % block_t
    if missing:
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block_t, *x.shape[2:]), 1, 0)


def join(x: jax.Array, tokens: int) -> jax.Array:
    """The inverse of `tiles`: [N, B, C, ...] -> [B, T, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :tokens]
