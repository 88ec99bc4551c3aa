"""The gradient of the chunked form: inputs and tile-start states are kept, everything else is computed again."""

from functools import partial

import jax

from hope_kernels.delta_rule.types import Inputs, State
from hope_kernels.delta_rule.xla import forward_tiles, join, split, tile_over_heads, tiles_of


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked(read: str, block_t: int, inputs: Inputs, state: State) -> tuple[jax.Array | None, State]:
    """The delta rule over several tiles; memory for the gradient is the inputs plus one state per tile."""
    return _forward(read, block_t, inputs, state)[0]


def _forward(read, block_t, inputs, state):
    y, end, starts = forward_tiles(read, tiles_of(inputs, block_t), state)
    return (None if y is None else join(y, inputs.k.shape[1]), end), (inputs, starts)


def _backward(read, block_t, saved, cotangents):
    inputs, starts = saved
    dy, d_end = cotangents

    def step(d_state: State, xs):
        inputs_n, start_n, dy_n = xs
        d_inputs, d_start = jax.vjp(partial(tile_over_heads, read), inputs_n, start_n)[1]((dy_n, d_state))
        return d_start, d_inputs

    dy = None if dy is None else split(dy, block_t)
    d_start, d_tiles = jax.lax.scan(step, d_end, (tiles_of(inputs, block_t), starts, dy), reverse=True)
    d_inputs = jax.tree.map(lambda x: join(x, inputs.k.shape[1]), d_tiles)
    return (d_inputs if inputs.mask is not None else d_inputs._replace(mask=None)), d_start


chunked.defvjp(_forward, _backward)


def forward(inputs: Inputs, state: State, *, read: str, block_t: int) -> tuple[jax.Array | None, State]:
    """Any number of tokens; a call that fits in one tile is that tile, without padding, loop or custom gradient."""
    if inputs.k.shape[1] > block_t:
        return chunked(read, block_t, inputs, state)
    y, state = tile_over_heads(read, jax.tree.map(lambda x: jax.numpy.moveaxis(x, 1, 2), inputs), state)
    return None if y is None else jax.numpy.moveaxis(y, 2, 1), state
