"""Levels in time: `nest(*levels)` runs an error function at the fastest clock, one `lax.scan` inside the other.

The body of level i is: run the faster levels over my chunk, then close my chunk (what that means is in `levels.py`). A
chunk may end in the middle of a call and go on in the next.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from hope_jax.levels import (
    absorb,
    add_pending,
    at_rest,
    begin,
    close,
    join_tokens,
    open_level,
    safe_pending,
    unmasked,
)
from hope_jax.local import local_error, local_output
from hope_jax.types import Level, LevelState, Nest, NestState, Params, Write, is_outer
from hope_jax.writing import write_chunk


def nest(
    *levels: Level,
    error: Callable | None = None,
    output: Callable | None = None,
    remat: bool = False,
    whole: Callable | None = None,
) -> Nest:
    """Levels in time, fastest first.

    Args:
        levels: chunk sizes must divide each other, fastest first.
        error: `error(params_by_level, carry, chunk) -> (errors_by_level, carry, ys)`, called on pieces of at most
            the fastest chunk size with the weights each level's chunk started with. Errors are trees like the
            weights: `Outer` leaves for local levels and `dgd` (or `Write(error, gates, query)`); `Outer` leaves
            or dense sums over the piece for global ones. Default: every level remembers the same `Tokens` with
            its own objective.
        output: `output(ys, reads) -> ys`, where reads[i] answers level i's query with running weights; needed
            only by error functions whose levels read "before" or "after".
        remat: recompute each fastest chunk in the backward pass instead of saving its intermediates.
        whole: `whole(level_state, xs) -> (level_state, ys)`, any number of whole chunks at once in the place of a scan
            over them, for a nest of one level; must give the same numbers.

    Returns:
        `Nest(params, init, apply)`, all for one example (a batch is `jax.vmap`):

        - `params(key) -> params_by_level`: start weights of every level from its memory;
        - `init(params_by_level, carry=None) -> state`: differentiable, so that start weights can be learned;
        - `apply(state, xs, phase=None) -> (state, ys)`: xs is a pytree with leaves [T, ...], T any length.
          `phase`, a Python int, is the number of tokens since the slowest level's last boundary. It is read
          from the state when the state is concrete or fresh; inside `jit` say it for a carried state (0 after
          whole chunks), or the nest steps token by token, which is exact and slow.

    Raises:
        ValueError: no levels, chunk sizes that do not divide, a level without an objective and no error function,
            `whole` with several levels, leaves of unequal length, or weights for another number of levels.

    Example:
        >>> import jax, optax
        >>> from hope_jax import Tokens, dgd, l2_regression, level, linear_memory
        >>> fast = level(linear_memory(4, 4), dgd(0.5), 2, objective=l2_regression)
        >>> slow = level(linear_memory(4, 4), optax.sgd(0.1), 8, objective=l2_regression)
        >>> n = nest(fast, slow)
        >>> x = jax.random.normal(jax.random.key(0), (20, 4))
        >>> state, (y_fast, y_slow) = n.apply(n.init(n.params(jax.random.key(1))), Tokens(x, x, x))
        >>> y_slow.shape, int(state.phase)
        ((20, 4), 4)

    Reference: paper sections 3 and 7, (71); spec 6.2.
    """
    _check_levels(levels, error, output)
    if whole is not None and len(levels) != 1:
        raise ValueError(f"whole= is for a nest of one level; got {len(levels)}")
    sizes = tuple(l.chunk_size for l in levels)
    if error is None:
        error, output = local_error(levels), local_output
    piece = _piece(levels, error, output)
    fast = jax.checkpoint(piece) if remat else piece

    def params(key: jax.Array) -> tuple[Params, ...]:
        missing = [i for i, l in enumerate(levels) if l.memory is None]
        if missing:
            raise ValueError(f"levels {missing} have no memory: give their start weights to init yourself")
        keys = jax.random.split(key, len(levels))
        return tuple(l.memory.init(k) for l, k in zip(levels, keys, strict=True) if l.memory)

    def init(params_by_level: tuple[Params, ...], carry: Any = None) -> NestState:
        if not isinstance(params_by_level, tuple | list) or len(params_by_level) != len(levels):
            raise ValueError(
                f"init takes one tree of weights per level, a tuple of {len(levels)}; got {params_by_level!r:.80}"
            )
        return NestState(tuple(map(open_level, levels, params_by_level)), carry, np.int32(0))

    def run(i: int, state, xs):
        """Whole chunks of level i: scan over them, each running the faster levels and then closing level i.

        Returns the state, the outputs, and the factored errors of slower levels, which wait for their own chunk.
        """
        if i < 0:
            return fast(*state, xs)
        if whole is not None:
            (only,), carry = state
            only, ys = whole(only, xs)
            return ((only,), carry), (ys, (None,))
        n = _length(xs) // sizes[i]
        chunks = jax.tree.map(lambda x: x.reshape(n, sizes[i], *x.shape[1:]), xs)

        def body(state, chunk):
            states, carry = state
            (states, carry), (ys, errors) = run(i - 1, (begin(levels, states, i), carry), chunk)
            states, errors = absorb(states, errors, [i])
            return (at_rest(close(levels, states, [i]), i), carry), (ys, errors)

        states, carry = state
        (states, carry), (ys, errors) = jax.lax.scan(body, (at_rest(states, i), carry), chunks)
        ys = jax.tree.map(lambda y: y.reshape(n * sizes[i], *y.shape[2:]), ys)
        return (begin(levels, states, i), carry), (ys, jax.tree.map(join_tokens, errors))

    def aligned(state: NestState, xs: Any, phase: int):
        """A call that knows its clock: whole chunks of the slowest levels that fit, pieces at the ends."""
        inner, parts, start = (state.levels, state.carry), [], 0
        for i, length, due in _segments(sizes, phase, _length(xs)):
            part = jax.tree.map(lambda x, a=start, n=length: x[a : a + n], xs)
            (states, carry), (ys, errors) = run(i, inner, part)
            states, _ = absorb(states, errors, range(len(levels)))
            inner = (close(levels, states, due), carry)
            parts.append(ys)
            start += length
        ys = jax.tree.map(lambda *y: jnp.concatenate(y), *parts) if len(parts) > 1 else parts[0]
        return NestState(*inner, np.int32((phase + _length(xs)) % sizes[-1])), ys

    def token_by_token(state: NestState, xs: Any):
        """A call that does not know its clock: one token a piece, boundaries by selection."""

        def body(state: NestState, x):
            piece_of_one = jax.tree.map(lambda a: a[None], x)
            (states, carry), (y, errors) = fast(state.levels, state.carry, piece_of_one)
            states, _ = absorb(states, errors, range(len(levels)))
            phase = state.phase + 1
            due = [phase % c == 0 for c in sizes]
            closed = close(levels, tuple(map(safe_pending, states, due)), range(len(levels)))
            states = tuple(
                jax.tree.map(lambda a, b, d=d: jnp.where(d, a, b), new, old)
                for d, new, old in zip(due, closed, states, strict=True)
            )
            return NestState(states, carry, phase % sizes[-1]), jax.tree.map(lambda a: a[0], y)

        return jax.lax.scan(body, state._replace(phase=jnp.asarray(state.phase, jnp.int32)), xs)

    def apply(state: NestState, xs: Any, phase: int | None = None) -> tuple[NestState, Any]:
        length = _length(xs)
        known = 0 if sizes[-1] == 1 else None if isinstance(state.phase, Tracer) else int(state.phase)
        if phase is None:
            phase = known
        elif not isinstance(phase, int):
            raise TypeError(f"phase must be a Python integer or None; got {phase!r}")
        elif known is not None and phase % sizes[-1] != known:
            raise ValueError(f"this state is {known} tokens after the slowest level's last boundary; got phase={phase}")
        if phase is None or length == 0:
            return token_by_token(state, xs)
        return aligned(state, xs, phase % sizes[-1])

    return Nest(params, init, apply)


def _check_levels(levels: tuple[Level, ...], error: Callable | None, output: Callable | None) -> None:
    if not levels:
        raise ValueError("nest needs at least one level")
    sizes = [l.chunk_size for l in levels]
    if any(slow % fast for fast, slow in itertools.pairwise(sizes)):
        raise ValueError(f"chunk sizes must divide, fastest first; got {sizes}")
    if error is None and any(l.objective is None or l.memory is None for l in levels):
        raise ValueError("without an error function every level needs a memory and an objective")
    if error is None and output is not None:
        raise ValueError("output= goes with an error function; without one, ys are the levels' reads")
    if error is not None and output is None and any(l.read != "start" for l in levels):
        reads = [l.read for l in levels]
        raise ValueError(f"levels that read running weights need output=, which receives the reads; got read={reads}")


def _length(xs: Any) -> int:
    lengths = {x.shape[0] for x in jax.tree.leaves(xs)}
    if len(lengths) != 1:
        raise ValueError(f"all inputs need one leading time axis of the same length; got lengths {sorted(lengths)}")
    return lengths.pop()


def _segments(sizes: tuple[int, ...], phase: int, length: int) -> Iterator[tuple[int, int, list[int]]]:
    """Cut a call at its boundaries: (level whose whole chunks it is or -1, tokens, slower levels that are due)."""
    now, end = phase, phase + length
    while now < end:
        fitting = [i for i, c in enumerate(sizes) if now % c == 0 and end - now >= c]
        i = max(fitting, default=-1)
        unit = sizes[i] if i >= 0 else 1
        stop = end if i + 1 == len(sizes) else min(end, (now // sizes[i + 1] + 1) * sizes[i + 1])
        tokens = (stop - now) // unit * unit
        now += tokens
        yield i, tokens, [j for j in range(i + 1, len(sizes)) if now % sizes[j] == 0]


def _piece(levels: tuple[Level, ...], error: Callable, output: Callable | None) -> Callable:
    """One piece of at most the fastest chunk: evaluate the errors, hand each level its own, read.

    Local levels write at once. Dense errors of global levels are added to `pending`; their factored errors are
    returned, so that a slow level contracts them once for its whole chunk.
    """

    def piece(states: tuple[LevelState, ...], carry: Any, xs: Any):
        errors, carry, ys = error(tuple(s.start for s in states), carry, xs)
        new, reads, waiting = [], [], []
        for lev, state, err in zip(levels, states, errors, strict=True):
            write = err if isinstance(err, Write) else Write(err)
            read = later = None
            if state.running is not None:
                running, rule, read = write_chunk(lev, state.running, state.rule, write)
                state = state._replace(running=running, rule=rule)
            elif all(map(is_outer, jax.tree.leaves(write.error, is_leaf=is_outer))):
                later = unmasked(write)
            elif write.mask is not None:
                raise ValueError("a mask needs factored errors; a dense sum must leave masked tokens out itself")
            else:
                state = add_pending(state, write.error)
            if state.running is None and (write.gates or write.query is not None):
                raise ValueError("gates and queries are for levels that write token by token: give it an objective")
            new.append(state)
            reads.append(read)
            waiting.append(later)
        return (tuple(new), carry), (output(ys, tuple(reads)) if output else ys, tuple(waiting))

    return piece
