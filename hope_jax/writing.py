"""How a local level writes a chunk of factored errors, and reads weights that change within the chunk.

Two ways with one result: through the delta-rule kernel when the rule has a chunk form, else token by token with the
rule's own `update`. The second is slow, exact for every optax transformation, and the oracle of the first.
"""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hope_jax.chunk_form import ChunkForm, FactoredTransformation, run_tree
from hope_jax.factors import factored_vjp
from hope_jax.linear_rules import linear_form
from hope_jax.types import Level, Linear, Memory, Objective, Params, Write, contract, gram, is_outer


def factored_errors(
    memory: Memory, objective: Objective, params: Params, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, Any]:
    """The error of every weight of a memory for pairs (key, value): the analytic gradient of the objective.

    Args:
        memory: the memory.
        objective: its loss; only `delta` is used.
        params: its weights, a tree of [..., K, V].
        key: [..., C, K].
        value: [..., C, V]; a constant of the inner gradient, differentiable outside.

    Returns:
        The memory's output for the keys [..., C, V], and a tree like `params` with `Outer` leaves.
    """

    def forward(refs: Params, linear: Linear) -> tuple[jax.Array, None]:
        return memory.apply(refs, key, linear=linear), None

    y, backward, _ = factored_vjp(forward, params)
    return y, backward(objective.delta(y, value).astype(y.dtype))


@lru_cache(maxsize=256)
def chunk_form(level: Level, gates: tuple[str, ...] = ()) -> ChunkForm | None:
    """The chunk form of a level's rule given these gates, found once; None if the rule must step token by token."""
    if isinstance(level.tx, FactoredTransformation):
        return level.tx.form
    if level.memory is None:
        return None
    return linear_form(level.tx, jax.eval_shape(level.memory.init, jax.random.key(0)), gates)


def write_chunk(
    level: Level, running: Params, rule: optax.OptState, write: Write
) -> tuple[Params, optax.OptState, jax.Array | None]:
    """Write a chunk into the running weights; answer its queries with them if the level reads them.

    Args:
        level: a local level.
        running: weights that hold all writes so far.
        rule: the state of the level's rule.
        write: the chunk's errors, gates and queries.

    Returns:
        New running weights, new rule state, and reads [..., C, V] (None for read="start" or without a query).
    """
    gates = {name: g for name, g in write.gates.items() if g is not None}
    form = chunk_form(level, tuple(sorted(gates)))
    query = None if level.read == "start" else write.query
    if form is None:
        return _token_by_token(level, running, rule, write._replace(query=query, gates=gates))

    def read(refs: Params, linear: Linear) -> jax.Array:
        return level.memory.apply(refs, query, linear=linear)

    z = form.momentum(rule)
    recs = form.recurrences(write.error, gates)
    reader = None if query is None else read
    new, new_z, y = run_tree(recs, running, z, mask=write.mask, read=level.read, reader=reader)
    cast = lambda new, old: new.astype(old.dtype)  # noqa: E731
    if z is not None:
        rule = form.with_momentum(rule, jax.tree.map(cast, new_z, z))
    return jax.tree.map(cast, new, running), rule, y


def _token_by_token(level: Level, running: Params, rule: optax.OptState, write: Write):
    """Step the rule's own `update` once per token with dense gradients. The definition of a local write."""
    tx = optax.with_extra_args_support(level.tx)
    if isinstance(level.tx, FactoredTransformation):
        as_updates = lambda error: error  # noqa: E731
    else:
        as_updates = lambda error: jax.tree.map(contract, error, is_leaf=is_outer)  # noqa: E731
    first = jax.tree.leaves(write.error, is_leaf=is_outer)[0].key
    axis = first.ndim - 2  # the token axis of keys, values and queries; the last axis of gates
    leading = first.shape[:-2]

    def tokens(x: jax.Array) -> jax.Array:  # token axis first, kept as an axis of one
        return jnp.expand_dims(jnp.moveaxis(x, axis, 0), axis + 1)

    def gate(x: jax.Array) -> jax.Array:  # one number per token and leading index, ready to scale [..., K, V]
        full = jnp.broadcast_to(x, (*leading, first.shape[-2]))
        return jnp.moveaxis(full, -1, 0).reshape(-1, *leading, *([1, 1] if leading else []))

    def step(carry, token):
        running, rule = carry
        error, gates, query, keep = token
        extra = dict(gates, gram=jax.tree.map(gram, error, is_leaf=is_outer))
        if isinstance(level.tx, FactoredTransformation):
            extra = {k: g.reshape(*leading, 1) for k, g in gates.items()}
        before, old = running, rule
        updates, rule = tx.update(as_updates(error), rule, running, **extra)
        running = optax.apply_updates(running, updates)
        if keep is not None:
            running, rule = jax.tree.map(lambda a, b: jnp.where(keep, a, b), (running, rule), (before, old))
        if query is None:
            return (running, rule), None
        y = level.memory.apply(before if level.read == "before" else running, query)
        return (running, rule), jnp.squeeze(y, axis)

    query = None if write.query is None else tokens(write.query)
    gates = {k: gate(jnp.asarray(g)) for k, g in write.gates.items()}
    xs = (jax.tree.map(tokens, write.error), gates, query, write.mask)
    (running, rule), y = jax.lax.scan(step, (running, rule), xs)
    return running, rule, None if y is None else jnp.moveaxis(y, 0, axis)
