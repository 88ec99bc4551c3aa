"""A level and its state through a chunk: open, begin, gather errors, close, rest.

Local levels (with an objective) write every piece into their `running` weights as it comes, with errors taken at
`start`. Global levels (without) sum their errors in `pending` and call their rule once. Closing a chunk makes the
weights that hold its writes the ones that the next chunk starts with.
"""

from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import optax

from hope_jax.chunk_form import FactoredTransformation, gate
from hope_jax.types import Level, LevelState, Memory, Objective, Params, Write, contract, is_outer

READS = ("start", "before", "after")


def level(
    memory: Memory | None,
    tx: optax.GradientTransformation,
    chunk_size: int,
    *,
    objective: Objective | None = None,
    read: Literal["start", "before", "after"] = "start",
    bptt_chunks: int | None = None,
    gates: tuple[str, ...] = (),
    restarts: bool = False,
) -> Level:
    """One memory with its rule and its clock.

    Args:
        memory: what is remembered with; None if the nest's error function alone knows the weights.
        tx: the rule, any optax transformation.
        chunk_size: C, tokens per write; errors are taken at the weights the chunk started with.
        objective: makes the level local: its errors are factored and per token. None makes it global: the nest's
            error function gives its errors, which are summed over the chunk, and the rule runs once per chunk
            (paper (71)); only `dgd`, which needs the product over the chunk's tokens, writes each one.
        read: the weights that answer a query of a local level: "start" of the chunk, or running, "before" or
            "after" the token's own write (spec 5.1).
        bptt_chunks: truncate the outer gradient after every so many writes; None never (spec 6.6).
        gates: names of per-token gates of a global level, each summed over the chunk and given to the rule as an extra
            argument [..., 1, 1]: "log_alpha" and "log_mu" (a chunk retains the product of its tokens' fractions) or
            "eta". Local levels need no names: their rule sees every token's gates.
        restarts: these weights are where the next faster level of a nest starts: whenever they have been written, it
            starts again from them, with a fresh rule state (spec 6.5).

    Raises:
        ValueError: chunk_size or bptt_chunks below 1, an unknown read, a running read of a level that is written only
            at the end of its chunk, or gates named for one that is written token by token.

    Example:
        >>> import optax
        >>> from hope_jax import l2_regression, linear_memory
        >>> level(linear_memory(4, 4), optax.sgd(0.1), 16, objective=l2_regression).chunk_size
        16
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is a number of tokens, at least 1; got {chunk_size}")
    if bptt_chunks is not None and bptt_chunks < 1:
        raise ValueError(f"bptt_chunks is a number of writes, at least 1, or None; got {bptt_chunks}")
    if read not in READS:
        raise ValueError(f"read must be one of {', '.join(READS)}; got {read!r}")
    made = Level(memory, tx, chunk_size, objective, read, bptt_chunks, tuple(gates), restarts)
    if read != "start" and not writes_tokens(made):
        raise ValueError(f"read={read!r} needs weights that change within the chunk: give the level an objective")
    if gates and writes_tokens(made):
        raise ValueError(f"gates={gates} are for a global level; this one is written token by token and sees all gates")
    return made


def writes_tokens(lev: Level) -> bool:
    """Is every token written as it comes? Local levels do, and rules that need the product over a chunk's tokens."""
    return lev.objective is not None or isinstance(lev.tx, FactoredTransformation)


def open_level(lev: Level, params: Params) -> LevelState:
    local = writes_tokens(lev)
    return LevelState(
        start=params,
        running=params if local else None,
        pending=None if local else jax.tree.map(jnp.zeros_like, params),
        rule=lev.tx.init(params),
        origin=None if lev.bptt_chunks is None else (params, jnp.zeros((), jnp.int32)),
        gates=_no_gates_yet(lev, params),
    )


def _no_gates_yet(lev: Level, params: Params) -> dict[str, jax.Array] | None:
    """Sums over no token: a number per leading index of the weights."""
    if not lev.gates:
        return None
    leaf = jax.tree.leaves(params)[0]
    return {name: jnp.zeros(leaf.shape[:-2], leaf.dtype) for name in lev.gates}


def at_rest(states: tuple[LevelState, ...], i: int) -> tuple[LevelState, ...]:
    """Level i between two chunks, where `running` is `start` and sums are zero: only `start` is carried."""
    return tuple(s._replace(running=None, pending=None, gates=None) if j == i else s for j, s in enumerate(states))


def begin(levels: tuple[Level, ...], states: tuple[LevelState, ...], i: int) -> tuple[LevelState, ...]:
    """Level i at the start of a chunk, from its weights at rest."""
    start = states[i].start
    local = writes_tokens(levels[i])
    fresh = states[i]._replace(
        running=start if local else None,
        pending=None if local else jax.tree.map(jnp.zeros_like, start),
        gates=_no_gates_yet(levels[i], start),
    )
    return tuple(fresh if j == i else s for j, s in enumerate(states))


def close(levels: tuple[Level, ...], states: tuple[LevelState, ...], due) -> tuple[LevelState, ...]:
    """The end of the chunks of some levels: all write, then the faster levels that they restart start again."""
    new = [_close_one(l, s) if i in due else s for i, (l, s) in enumerate(zip(levels, states, strict=True))]
    for i in due:
        while levels[i].restarts:  # down a chain of levels that hold each other's start
            new[i - 1] = open_level(levels[i - 1], new[i].start)
            i -= 1
    return tuple(new)


def _close_one(lev: Level, state: LevelState) -> LevelState:
    """The end of a level's chunk: what was written becomes what the next chunk starts with."""
    if state.running is not None:
        new, rule, pending = state.running, state.rule, None
    else:
        tx = optax.with_extra_args_support(lev.tx)
        gates = {name: total[..., None, None] for name, total in (state.gates or {}).items()}
        updates, rule = tx.update(cast(Any, state.pending), state.rule, state.start, **gates)
        new = optax.apply_updates(state.start, updates)
        pending = jax.tree.map(jnp.zeros_like, state.pending)
    origin = state.origin
    if origin is not None and lev.bptt_chunks is not None:
        theta0, writes = origin
        cut = (writes + 1) % lev.bptt_chunks == 0
        new = jax.tree.map(lambda w, w0: jnp.where(cut, w0 + jax.lax.stop_gradient(w - w0), w), new, theta0)
        rule = jax.tree.map(lambda r: jnp.where(cut, jax.lax.stop_gradient(r), r), rule)
        origin = (theta0, writes + 1)
    return LevelState(new, None if state.running is None else new, pending, rule, origin, _no_gates_yet(lev, new))


def safe_pending(state: LevelState, due: jax.Array) -> LevelState:
    """Ones where the level is not due: the step it then takes is not selected, but its gradient must be finite."""
    return state._replace(pending=jax.tree.map(lambda p: jnp.where(due, p, jnp.ones_like(p)), state.pending))


def add_pending(state: LevelState, error: Any) -> LevelState:
    """Add an error, dense or factored, to what is pending."""
    dense = jax.tree.map(lambda e: contract(e) if is_outer(e) else e, error, is_leaf=is_outer)
    return state._replace(pending=jax.tree.map(jnp.add, state.pending, dense))


def add_gates(lev: Level, state: LevelState, write: Write) -> LevelState:
    """Add the gates [..., C] of a piece to the sums of a global level; masked tokens retain all and step by nothing."""
    if write.query is not None or (write.gates and not lev.gates):
        raise ValueError(
            "gates and queries are for levels that write token by token: give it an objective "
            "(a global level names its gates in level(gates=...))"
        )
    if state.gates is None:
        return state
    missing = [name for name in lev.gates if not {name, name.removeprefix("log_")} & set(write.gates)]
    if missing:
        raise ValueError(f"the level's gates are {lev.gates}, but its errors come with {sorted(write.gates)}")
    length = next(iter(write.gates.values())).shape[-1]

    def total(name: str, so_far: jax.Array) -> jax.Array:
        token: Any = gate(write.gates, name, (*so_far.shape, length))
        if write.mask is not None:
            token = jnp.where(jnp.broadcast_to(write.mask, token.shape), token, 0)
        return (so_far + token.sum(-1)).astype(so_far.dtype)

    return state._replace(gates={name: total(name, so_far) for name, so_far in state.gates.items()})


def absorb(states: tuple[LevelState, ...], errors: tuple, which) -> tuple[tuple[LevelState, ...], tuple]:
    """Add the waiting factored errors of some levels to what is pending; the others go on waiting."""
    mine = [j in which and e is not None for j, e in enumerate(errors)]
    states = tuple(add_pending(s, e) if m else s for s, e, m in zip(states, errors, mine, strict=True))
    return states, tuple(None if m else e for e, m in zip(errors, mine, strict=True))


def unmasked(write: Write) -> Any:
    """Factored errors without those of masked tokens."""
    if write.mask is None:
        return write.error
    keep = write.mask[:, None]
    return jax.tree.map(
        lambda e: e._replace(delta=jnp.where(keep.reshape((1,) * (e.delta.ndim - 2) + keep.shape), e.delta, 0)),
        write.error,
        is_leaf=is_outer,
    )


def join_tokens(factor: jax.Array) -> jax.Array:
    """Factors of N pieces [N, ..., C, K] as those of one [..., N C, K]."""
    x = jnp.moveaxis(factor, 0, -3)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])
