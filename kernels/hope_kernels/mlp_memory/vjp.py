"""The gradient of a walk over chunks: the state is kept before every `group`-th chunk only.

Backwards, the states inside a group are computed again from the one before it, then the group's chunks are
differentiated one by one, the last one first. N chunks in groups of g hold N / g + g states at a time.
"""

from collections.abc import Callable
from functools import partial

import jax
from jax.ad_checkpoint import checkpoint_name

from hope_kernels.mlp_memory.types import Inputs, State

STATES = "mlp_memory_states"  # name of the states before each group, for `jax.checkpoint` policies

type Reads = jax.Array | None  # [N, ...]
type Step = Callable[[Inputs, State], tuple[Reads, State]]  # one chunk


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def walk(step: Step, group: int, chunks: Inputs, state: State) -> tuple[Reads, State]:
    """`step` over chunks [N, ...], the state handed on; `group` divides N."""
    return _forward(step, group, chunks, state)[0]


def _forward(step, group, chunks, state):
    def one_chunk(start: State, inputs: Inputs):
        y, end = step(inputs, start)
        return end, y

    def one_group(start: State, inputs: Inputs):
        end, y = jax.lax.scan(one_chunk, start, inputs)
        return end, (y, start)

    end, (y, starts) = jax.lax.scan(one_group, state, _split(chunks, group))
    return (_join(y), end), (chunks, checkpoint_name(starts, STATES))


def _backward(step, group, saved, cotangents):
    chunks, starts = saved
    dy, d_end = cotangents

    def again(start: State, inputs: Inputs):
        return step(inputs._replace(q=None), start)[1], start

    def one_chunk(d_end: State, xs):
        inputs, start, dy = xs
        d_inputs, d_start = jax.vjp(step, inputs, start)[1]((dy, d_end))
        return d_start, d_inputs

    def one_group(d_end: State, xs):
        inputs, start, dy = xs
        starts = jax.lax.scan(again, start, inputs)[1]
        return jax.lax.scan(one_chunk, d_end, (inputs, starts, dy), reverse=True)

    d_start, d_chunks = jax.lax.scan(one_group, d_end, (_split(chunks, group), starts, _split(dy, group)), reverse=True)
    return _join(d_chunks), d_start


walk.defvjp(_forward, _backward)


def _split(tree, group: int):
    """[N, ...] -> [N / group, group, ...]"""
    return jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), tree)


def _join(tree):
    """The inverse of `_split`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
