"""A layer over a sequence that lies on several devices, each waiting for the state of the one before: a wavefront.

Whatever the state holds, an MLP memory, its momentum, the tail of a convolution, it is handed on as it is, so the
result is that of one device, gradients included. Rows know nothing of each other, so while the second device works on
the first rows the first one has the next: G groups of rows on D devices use G / (D + G - 1) of the time.
Memories whose heads divide over the axis need no waiting (`placement.by_head`).
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
        groups: G, of rows, which divides B; more groups wait less.

    Returns:
        The same function, to be traced with a mesh in context and T a multiple of the axis' size D.

    Raises:
        ValueError: `groups` does not divide the rows.
    """

    def run(params: Any, state: Any, xs: Any) -> tuple[Any, Any]:
        rows = jax.tree.leaves(state)[0].shape[0]
        if rows % groups:
            raise ValueError(f"groups={groups} does not divide {rows} rows; give a divisor")
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

    def turn(received: Any, step: jax.Array) -> tuple[Any, tuple[Any, Any]]:
        group = jnp.clip(step - device, 0, groups - 1)
        before = jax.tree.map(lambda a, b: jnp.where(device == 0, a, b), at(states, group), received)
        after, ys = apply(params, before, at(pieces, group))
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, onward), after), (after, ys)

    # A device whose turn has not come, or is over, works on something finite that nobody reads.
    _, (ends, ys) = jax.lax.scan(turn, at(states, 0), jnp.arange(groups + devices - 1, dtype=jnp.int32))
    mine = lambda x: _in_rows(jax.lax.dynamic_slice_in_dim(x, device, groups))  # noqa: E731
    last = jax.tree.map(lambda x: jax.lax.all_gather(mine(x), axis)[-1], ends)
    return last, jax.tree.map(mine, ys)


def _in_groups(x: jax.Array, groups: int) -> jax.Array:
    """[B, ...] -> [G, B / G, ...]: group i has rows i, i + G, ..., so that rows stay on their devices."""
    return jnp.swapaxes(x.reshape(x.shape[0] // groups, groups, *x.shape[1:]), 0, 1)


def _in_rows(x: jax.Array) -> jax.Array:
    """[G, B / G, ...] -> [B, ...], the reverse of `_in_groups`."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
