"""The slots of a pool: the arrays of many streams in one, and the programs that all of them share."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hope_jax.online.stream import ChunkReport, Pieces, Stream, StreamState, choose


class Ahead(NamedTuple):
    """Contexts that have read held tokens too, for answers."""

    carry: Any
    logits_BV: jax.Array  # of what comes next


class Programs(NamedTuple):
    """What all slots go through in one call."""

    advance: Callable[[Any, StreamState, Pieces], tuple[StreamState, ChunkReport]]
    read_on: Callable[..., Ahead]
    # (params, state, ahead, starts_B, reads_B, token_B): one more token in the rows that read; those that start do so
    # from the context after whole chunks


@jax.jit
def take(tree: Any, slot: Any) -> Any:
    """One row [1, ...]."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, slot, 1), tree)


@jax.jit
def put(tree: Any, row: Any, slot: Any) -> Any:
    """With another row in its slot."""
    return jax.tree.map(lambda all_, one: jax.lax.dynamic_update_slice_in_dim(all_, one, slot, 0), tree, row)


@functools.cache
def programs(stream: Stream, together: bool) -> Programs:
    """For the slots of this stream: all of them at once, or one after the other (`Pool`)."""

    def next_token(params: Any, ahead: Ahead, state: StreamState, starts_B: Any, token_B: Any) -> Ahead:
        carry = choose(starts_B, state.nest.carry, ahead.carry)
        return Ahead(*stream.step(params, state.nest.levels, carry, token_B))

    def read_on(params: Any, state: StreamState, ahead: Ahead, starts_B: Any, reads_B: Any, token_B: Any) -> Ahead:
        if together:
            return choose(reads_B, next_token(params, ahead, state, starts_B, token_B), ahead)
        return _in_turn(functools.partial(next_token, params), reads_B, ahead, (state, starts_B, token_B))

    def advance(params: Any, state: StreamState, pieces: Pieces) -> tuple[StreamState, ChunkReport]:
        report_BN = jax.eval_shape(stream.advance, params, state, pieces)[1]
        empty_BN = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), report_BN)

        def one(changing: Any, pieces: Pieces) -> Any:
            return stream.advance(params, changing[0], pieces)

        return _in_turn(one, pieces.live_BN.any(axis=1), (state, empty_BN), (pieces,))

    return Programs(stream.advance if together else jax.jit(advance), jax.jit(read_on))


def _in_turn[T](f: Callable[..., T], live_B: jax.Array, changing: T, fixed: tuple) -> T:
    """`f(changing, *fixed)` of one live row [1, ...] after the other; the others cost nothing and stay as they are."""
    slots_B = jnp.argsort(~live_B)  # live ones first

    def body(i: jax.Array, changing: T) -> T:
        new = f(take(changing, slots_B[i]), *take(fixed, slots_B[i]))
        return put(changing, new, slots_B[i])

    return jax.lax.fori_loop(0, live_B.sum(), body, changing)
