"""Which optax transformations have a chunk form: recognised by what they do, not by who made them.

An element-wise linear transformation with at most one momentum, such as `optax.sgd(0.1)`, `optax.sgd(0.1, 0.9)`,
or `optax.chain(optax.sgd(0.1), heavy_ball(), retention())`, maps (gradient g, momentum m, weight p) to

    update = u_g g + u_m m + u_p p          m' = m_g g + m_m m

with numbers that may depend on the gates alone. Applied token by token to errors taken at one point it is the
recurrence of `chunk_form.py` with alpha = 1 + u_p, mu = m_m and write u_g delta. `linear_form` finds the numbers
by applying the transformation to basis vectors, after checking that it is linear (it can be transposed), has no
offset and mixes no elements; any other transformation has no chunk form and is stepped token by token.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hope_jax.chunk_form import ChunkForm, Gates, Recurrence, gate
from hope_jax.types import Outer, Params, is_outer

_PROBES = ({"eta": 0.3, "alpha": 0.7, "mu": 0.6}, {"eta": 0.2, "alpha": 0.9, "mu": 0.4})


class _Numbers(NamedTuple):
    """Per weight: what one step makes of a unit gradient, momentum or weight."""

    u_g: Any
    u_m: Any
    u_p: Any
    m_g: Any
    m_m: Any
    m_p: Any


def linear_form(tx: optax.GradientTransformation, params: Params) -> ChunkForm | None:
    """The chunk form of an element-wise linear transformation, or None if `tx` is anything else.

    Args:
        tx: any optax transformation.
        params: the weights it will see, a tree of arrays or shapes (only the structure matters).
    """
    treedef = jax.tree.structure(params)
    tx = optax.with_extra_args_support(tx)
    with jax.ensure_compile_time_eval():
        if not _is_elementwise_linear(tx, treedef):
            return None
        first, second = (_numbers(tx, treedef, probe) for probe in _PROBES)
        if not _fits_recurrence(first) or not np.allclose(_gain(first), _gain(second), rtol=1e-5):
            return None
        gain = np.asarray(_gain(first))  # Z = gain * m, one number per weight
    has_momentum = bool(np.any(gain))

    def recurrences(errors: Any, gates: Gates) -> Any:
        outers = treedef.flatten_up_to(errors)
        return treedef.unflatten([_recurrence(tx, treedef, i, o, gates, has_momentum) for i, o in enumerate(outers)])

    def scale(tree: Params, factors: np.ndarray) -> Params:
        leaves = jax.tree.leaves(tree)
        return treedef.unflatten([x * float(f) for x, f in zip(leaves, factors, strict=True)])

    def momentum(state: optax.OptState) -> Params | None:
        return scale(state, gain) if has_momentum else None

    def with_momentum(state: optax.OptState, z: Params) -> optax.OptState:
        if not has_momentum:
            return state
        return jax.tree.structure(state).unflatten(jax.tree.leaves(scale(z, 1 / gain)))

    return ChunkForm(recurrences, momentum, with_momentum)


def _step(tx: Any, treedef: Any, shape: tuple[int, ...], gates: Gates):
    """One step of `tx` on weights of one small shape, as (function of stacked [g, m, p], number of momenta)."""
    zeros = treedef.unflatten([jnp.zeros(shape)] * treedef.num_leaves)
    state = tx.init(zeros)
    slots = jax.tree.leaves(state)

    def step(g: jax.Array, m: jax.Array, p: jax.Array) -> tuple[jax.Array, jax.Array]:  # each [weights, *shape]
        tree = lambda x: treedef.unflatten(list(x))  # noqa: E731
        old = jax.tree.structure(state).unflatten(list(m)) if slots else state
        updates, new = tx.update(tree(g), old, tree(p), **gates)
        kept = jax.tree.leaves(new)
        return jnp.stack(jax.tree.leaves(updates)), jnp.stack(kept) if kept else jnp.zeros_like(m)

    return step, slots


def _is_elementwise_linear(tx: Any, treedef: Any) -> bool:
    n = treedef.num_leaves
    try:
        step, slots = _step(tx, treedef, (2, 2), _PROBES[0])
        plain = all(s.shape == (2, 2) and jnp.issubdtype(s.dtype, jnp.floating) for s in slots)
        if not n or len(slots) not in (0, n) or not plain:
            return False
        zero = jnp.zeros((n, 2, 2))
        jax.linear_transpose(step, zero, zero, zero)(step(zero, zero, zero))  # raises if not linear
        jacobians = jax.jacobian(step, argnums=(0, 1, 2))(zero, zero, zero)
        offset = max(float(jnp.max(jnp.abs(x))) for x in step(zero, zero, zero))
        return offset == 0 and all(_is_diagonal(j, n) for j in jax.tree.leaves(jacobians))
    except Exception:
        # Whatever a foreign transformation does with scalars, momenta or tracers it does not expect, and whatever
        # traced numbers it has closed over, the answer is the same: it has no chunk form, and the exact token loop
        # runs it (and raises what it has to say).
        return False


def _is_diagonal(jacobian: jax.Array, n: int) -> bool:
    """Does every element depend on the same element alone, by one factor per weight?"""
    blocks = np.asarray(jacobian).reshape(n, 4, n, 4)
    factors = blocks[:, 0, :, 0].diagonal()
    want = np.einsum("w,wv,ij->wivj", factors, np.eye(n), np.eye(4))
    return bool(np.allclose(blocks, want, rtol=1e-5, atol=1e-7))


def _numbers(tx: Any, treedef: Any, gates: Gates) -> _Numbers:
    """The six numbers per weight, each [weights], for scalar gates."""
    step, _ = _step(tx, treedef, (), gates)
    one, zero = jnp.ones(treedef.num_leaves), jnp.zeros(treedef.num_leaves)
    (u_g, m_g), (u_m, m_m), (u_p, m_p) = step(one, zero, zero), step(zero, one, zero), step(zero, zero, one)
    return _Numbers(u_g, u_m, u_p, m_g, m_m, m_p)


def _gain(x: _Numbers) -> np.ndarray:
    """u_g / m_g, the factor between the transformation's momentum and the recurrence's Z; 0 without momentum."""
    m_g = np.asarray(x.m_g)
    return np.where(m_g != 0, np.asarray(x.u_g) / np.where(m_g != 0, m_g, 1.0), 0.0)


def _fits_recurrence(x: _Numbers) -> bool:
    """Is the momentum's action u_m m the decayed Z, that is u_m = m_m u_g / m_g, and alpha positive?"""
    u_m, u_p, m_g, m_m, m_p = map(np.asarray, x[1:])
    with_momentum = bool(np.any(m_g))
    consistent = np.allclose(u_m, m_m * _gain(x), rtol=1e-5, atol=1e-7) and (not with_momentum or np.all(m_g != 0))
    return bool(consistent and np.all(m_p == 0) and np.all(1 + u_p > 0) and (with_momentum or not np.any(u_m)))


def _recurrence(tx: Any, treedef: Any, i: int, error: Outer, gates: Gates, has_momentum: bool) -> Recurrence:
    """Weight i's recurrence with the gates of a chunk."""
    assert is_outer(error)
    shape = error.key.shape[:-1]
    per_token = {k: gate(gates, k, shape) for k in ("eta", "alpha", "log_alpha", "mu", "log_mu")}
    per_token = {k: v.reshape(-1) for k, v in per_token.items() if v is not None}

    def numbers(token_gates: Gates) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = _numbers(tx, treedef, token_gates)
        return x.u_g[i], x.u_p[i], x.m_m[i]

    forgets = True
    if per_token:
        u_g, u_p, m_m = (x.reshape(shape) for x in jax.vmap(numbers)(per_token))
    else:
        with jax.ensure_compile_time_eval():
            u_g, u_p, m_m = numbers({})
            forgets = bool(u_p != 0)
        u_g, u_p, m_m = (jnp.broadcast_to(x, shape) for x in (u_g, u_p, m_m))
    return Recurrence(
        key=error.key,
        write=u_g[..., None] * error.delta,
        erase=None,
        log_alpha=jnp.log1p(u_p) if forgets else None,
        log_mu=gate({"mu": m_m}, "log_mu", shape) if has_momentum else None,
    )
