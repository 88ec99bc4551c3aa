"""One sequence as segments that run side by side, around any implementation.

A segment is an affine map of the state, S -> M S + B. A first run over all segments at once, without reads, finds M and
B: what is written goes into columns that start at zero, and the identity goes through in further columns, in which
nothing is written. Handing the first state through the maps gives every segment its own start, and a second run takes
the segments as batch entries. The gradient goes the same way backwards, with the transposes of M; the first run is not
differentiated. With momentum, state and momentum are one state of 2K rows.

The segments may lie on the devices of a mesh axis (`config.axis`): the maps are gathered and not the tokens, K (K + V)
numbers per head and segment, and every device hands the state through all of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hope_kernels.delta_rule.config import Config
from hope_kernels.delta_rule.types import Inputs, State
from hope_kernels.delta_rule.vjp import STATES, join, tiles

type Reads = jax.Array | None  # [N, B, L, H, V]: N segments of L tokens
type Run = Callable[[Inputs, State], tuple[jax.Array | None, State]]  # arrays [B, T, H, ...], states [B, H, K, V]


def in_segments(forward: Callable[..., Any], choose: Callable[[Inputs], int] | None = None) -> Callable[..., Any]:
    """The `forward` of an implementation, cut into `config.segments` segments, or as many as `choose` says, or one."""

    def run(
        inputs: Inputs, state: State, *, read: str, config: Config, precision: str
    ) -> tuple[jax.Array | None, State]:
        whole = partial(forward, read=read, config=config, precision=precision)
        tokens = inputs.k.shape[1]
        segments = min(config.segments or (choose(inputs) if choose else 1), tokens)
        if segments == 1 and config.axis is None:
            return whole(inputs, state)
        result: Any = _side_by_side(whole, config.axis, tiles(inputs, -(-tokens // segments)), state)
        y, end = result
        return None if y is None else join(y, tokens), end

    return run


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _side_by_side(run: Run, axis: str | None, inputs: Inputs, state: State) -> tuple[Reads, State]:
    """Reads and the last state; inputs [N, B, L, H, ...], states [B, H, K, V]."""
    return _forward(run, axis, inputs, state)[0]


def _forward(run: Run, axis: str | None, inputs: Inputs, state: State):
    maps, shifts = _affine_maps(run, inputs, state)
    maps, starts = checkpoint_name((maps, _hand_through(_stacked(state), maps, shifts, axis)), STATES)
    (y, ends), pullback = jax.vjp(partial(_as_batch, run), inputs, _unstacked(starts, state))
    last = jax.tree.map(lambda x: x[-1], ends)
    if axis is not None:  # that of the last device, on all of them
        last = _only_of(jax.lax.axis_size(axis) - 1, last, axis)
        last = jax.tree.map(partial(jax.lax.psum, axis_name=axis), last)
    return (y, last), (pullback, maps)


def _backward(run: Run, axis: str | None, saved: tuple[Any, jax.Array], cotangents: tuple[Reads, State]):
    del run
    pullback, maps = saved
    dy, d_last = cotangents
    if axis is not None:  # every device holds a share of the cotangent of what all of them returned
        d_last = jax.tree.map(partial(jax.lax.psum, axis_name=axis), d_last)
    from_reads = jax.tree.map(lambda x: jnp.zeros((maps.shape[0], *x.shape), x.dtype), d_last)
    if dy is not None:
        from_reads = pullback((dy, from_reads))[1]
    d_ends = _hand_through(_stacked(d_last), jnp.swapaxes(maps, -1, -2), _stacked(from_reads), axis, backwards=True)
    d_inputs, d_starts = pullback((dy, _unstacked(d_ends, d_last)))
    d_first = jax.tree.map(lambda x: x[0], d_starts)
    return d_inputs, d_first if axis is None else _only_of(0, d_first, axis)


_side_by_side.defvjp(_forward, _backward)


def _affine_maps(run: Run, inputs: Inputs, state: State) -> tuple[jax.Array, jax.Array]:
    """M [N, B, H, K, K] and B [N, B, H, K, V] of every segment; 2K for K with momentum."""
    segments, value_width = inputs.u.shape[0], inputs.u.shape[-1]
    empty = _stacked(jax.tree.map(jnp.zeros_like, state))
    rows = empty.shape[-2]
    identity = jnp.broadcast_to(jnp.eye(rows, dtype=empty.dtype), (*empty.shape[:-1], rows))
    start = jnp.concatenate([empty, identity], -1)
    starts = _unstacked(jnp.broadcast_to(start, (segments, *start.shape)), state)
    wider = inputs._replace(q=None, u=jnp.pad(inputs.u, [(0, 0)] * 4 + [(0, rows)]))
    ends = _stacked(_as_batch(run, wider, starts)[1])
    return ends[..., value_width:], ends[..., :value_width]


def _hand_through(
    first: jax.Array, maps: jax.Array, shifts: jax.Array, axis: str | None = None, backwards: bool = False
) -> jax.Array:
    """The state before each of N maps, [N, B, H, K, V], the first one given; the last map is not needed.

    With an `axis` the N maps are those of this device, and the others' come before and after them. Backwards, the first
    state is that before the last map.
    """
    count = maps.shape[0]
    if axis is not None:
        maps, shifts = (jax.lax.all_gather(x, axis, tiled=True) for x in (maps, shifts))
    if backwards:
        maps, shifts = maps[::-1], shifts[::-1]
    states = _states_before(first, maps, shifts)
    if backwards:
        states = states[::-1]
    if axis is None:
        return states
    return jax.lax.dynamic_slice_in_dim(states, jax.lax.axis_index(axis) * count, count)


def _only_of(device: int, tree: Any, axis: str) -> Any:
    """`tree` on one device of an axis, zeros on the others."""
    mine = jax.lax.axis_index(axis) == device
    return jax.tree.map(lambda x: jnp.where(mine, x, jnp.zeros_like(x)), tree)


def _states_before(first: jax.Array, maps: jax.Array, shifts: jax.Array) -> jax.Array:
    def after(earlier, later):
        (m, b), (next_m, next_b) = earlier, later
        product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        return product(next_m, m), product(next_m, b) + next_b

    maps = jnp.concatenate([jnp.zeros_like(maps[:1]), maps[:-1]])
    shifts = jnp.concatenate([first[None], shifts[:-1]])
    return jax.lax.associative_scan(after, (maps, shifts))[1]


def _as_batch(run: Run, inputs: Inputs, states: State) -> tuple[Reads, State]:
    """`run` with the segments as batch entries."""
    segments = inputs.k.shape[0]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (inputs, states))
    return jax.tree.map(lambda x: x.reshape(segments, -1, *x.shape[1:]), run(*flat))


def _stacked(state: State) -> jax.Array:
    """[..., K, V], or with momentum [..., 2K, V]."""
    return state.s if state.z is None else jnp.concatenate([state.s, state.z], -2)


def _unstacked(x: jax.Array, like: State) -> State:
    if like.z is None:
        return State(x, None)
    s, z = jnp.split(x, 2, -2)
    return State(s, z)
