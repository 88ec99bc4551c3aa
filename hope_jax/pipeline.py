"""A layer over a sequence that lies on several devices, each waiting for the state of the one before: a wavefront.

Whatever the state holds, an MLP memory, its momentum, the tail of a convolution, it is handed on as it is, so the
result is that of one device, gradients included. Rows know nothing of each other, so while the second device works on
the first rows the first one has the next: G groups of rows on D devices use G / (D + G - 1) of the time.
Memories whose heads divide over the axis need no waiting (`placement.by_head`), and inside a wavefront no other hints:
the compiler places rows and heads by itself, and kernels run in their XLA form.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


def pipelined(apply: Callable[..., tuple[Any, Any]], axis: str, groups: int) -> Callable[..., tuple[Any, Any]]:
    """`apply(params, state, xs) -> (state, ys)` with the tokens divided over a mesh axis.

    Args:
        apply: a layer for a batch: leaves of `state` are [B, ...], of `xs` and `ys` [B, T, ...], and any cut of the
            tokens into pieces of T / D gives the same result.
        axis: of the mesh in context, whose other axes are left to the compiler.
        groups: G, of rows, which divides B; more groups wait less. A group stays where its rows are if B / G is a
            multiple of the devices that divide the rows; else its rows are gathered.

    Returns:
        The same function, to be traced with a mesh in context and T a multiple of the axis' size D.

    Raises:
        ValueError: `groups` does not divide the rows, or the axis does not divide the tokens.
    """

    def run(params: Any, state: Any, xs: Any) -> tuple[Any, Any]:
        rows = jax.tree.leaves(state)[0].shape[0]
        if groups < 1 or rows % groups:
            raise ValueError(f"groups={groups} does not divide {rows} rows; give a divisor")
        tokens, devices = jax.tree.leaves(xs)[0].shape[1], jax.sharding.get_abstract_mesh().shape.get(axis, 1)
        if tokens % devices:
            raise ValueError(f"{tokens} tokens do not divide over the {devices} devices of {axis!r}; pad them")
        manual = jax.shard_map(
            lambda *args: _wavefront(apply, axis, groups, *args),
            axis_names={axis},
            in_specs=(P(), P(), P(None, axis)),
            out_specs=(P(), P(None, axis)),
            check_vma=False,
        )
        return manual(params, state, xs)

    return run


def _wavefront(apply: Callable, axis: str, groups: int, params: Any, state: Any, xs: Any) -> tuple[Any, Any]:
    """On device d of D: group g in turn d + g, with the state that device d - 1 ended it with."""
    device, devices = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    states, pieces = (jax.tree.map(lambda x: _in_groups(x, groups), tree) for tree in (state, xs))
    at = lambda tree, g: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, g, keepdims=False), tree)  # noqa: E731
    onward = [(i, i + 1) for i in range(devices - 1)]

    def take_turn(received: Any, step: jax.Array) -> tuple[Any, tuple[Any, Any]]:
        turn = step - device
        group = jnp.clip(turn, 0, groups - 1)
        # A device whose turn has not come, or is over, works on a start that nobody reads the end of.
        fresh = (device == 0) | (turn != group)
        before = jax.tree.map(lambda a, b: jnp.where(fresh, a, b), at(states, group), received)
        after, ys = apply(params, before, at(pieces, group))
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, onward), after), (after, ys)

    _, (ends, ys) = jax.lax.scan(take_turn, at(states, 0), jnp.arange(groups + devices - 1, dtype=jnp.int32))
    mine = lambda x: _in_rows(jax.lax.dynamic_slice_in_dim(x, device, groups))  # noqa: E731
    return jax.tree.map(lambda x: _of_the_last(mine(x), axis), ends), jax.tree.map(mine, ys)


def _of_the_last(x: jax.Array, axis: str) -> jax.Array:
    """What the last device holds, on all of them."""
    last = jax.lax.axis_index(axis) == jax.lax.axis_size(axis) - 1
    number = x.astype(jnp.int32) if x.dtype == bool else x
    return jax.lax.psum(jnp.where(last, number, jnp.zeros_like(number)), axis).astype(x.dtype)


def _in_groups(x: jax.Array, groups: int) -> jax.Array:
    """[B, ...] -> [G, B / G, ...]: group i has rows i, i + G, ..., so that rows stay on their devices."""
    return jnp.swapaxes(x.reshape(x.shape[0] // groups, groups, *x.shape[1:]), 0, 1)


def _in_rows(x: jax.Array) -> jax.Array:
    """[G, B / G, ...] -> [B, ...], the reverse of `_in_groups`."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
