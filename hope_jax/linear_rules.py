"""Which optax transformations have a chunk form: recognised by what they do, not by who made them.

An element-wise linear transformation with at most one momentum, such as `optax.sgd(0.1)`, `optax.sgd(0.1, 0.9)`,
or `optax.chain(optax.sgd(0.1), heavy_ball(), retention())`, maps (gradient g, momentum m, weight p) to

    update = u_g g + u_m m + u_p p          m' = m_g g + m_m m

with numbers, one of each per weight, that may depend on the gates alone. Applied token by token to errors taken at one
point it is the recurrence of `chunk_form.py` with alpha = 1 + u_p, mu = m_m and write u_g delta. `linear_form` takes
the numbers from one step on ones, and checks that they predict the step on random numbers, tiny and huge, of the
weights' real shapes; any other transformation has no chunk form and is stepped token by token.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hope_jax.chunk_form import ChunkForm, Gates, Recurrence, gate
from hope_jax.types import Outer, Params, is_outer

_PROBES = (
    {"eta": 0.3, "alpha": 0.7, "mu": 0.6, "log_alpha": -0.3, "log_mu": -0.6},
    {"eta": 0.2, "alpha": 0.9, "mu": 0.4, "log_alpha": -0.1, "log_mu": -0.9},
)
_OTHER = (0.3, 0.2)  # gates that are not listed
_SCALES = (1e-20, 1e20)  # a threshold between them is found


class _Numbers(NamedTuple):
    """What one step makes of a unit gradient, momentum or weight; each [weights]."""

    u_g: Any
    u_m: Any
    u_p: Any
    m_g: Any
    m_m: Any


class _Rule(NamedTuple):
    """An optax transformation with the tree and the shapes of its weights."""

    tx: Any
    treedef: Any
    shapes: list[tuple[int, ...]]

    def step(self, g: list, m: list, p: list, gates: dict) -> tuple[list, list]:
        """(updates, new momenta) of one step."""
        tree = self.treedef.unflatten
        state = jax.tree.structure(self.state()).unflatten(m)
        updates, new = self.tx.update(tree(g), state, tree(p), **gates)
        return jax.tree.leaves(updates), jax.tree.leaves(new)

    def state(self) -> Any:
        return self.tx.init(self.treedef.unflatten([jnp.zeros(s) for s in self.shapes]))

    def numbers(self, gates: dict) -> _Numbers:
        """The numbers, from elements that say the same all over each weight."""
        n, slots = len(self.shapes), len(jax.tree.leaves(self.state()))
        ones, zeros = ([f(s) for s in self.shapes] for f in (jnp.ones, jnp.zeros))
        u_g, m_g = self.step(ones, zeros[:slots], zeros, gates)
        u_p, m_p = self.step(zeros, zeros[:slots], ones, gates)
        u_m, m_m = self.step(zeros, ones, zeros, gates) if slots else ([jnp.zeros(())] * n, [])
        del m_p  # zero, or the check fails
        first = lambda leaves: jnp.stack([x.reshape(-1)[0] for x in leaves]) if leaves else jnp.zeros(n)  # noqa: E731
        return _Numbers(first(u_g), first(u_m), first(u_p), first(m_g), first(m_m))


def linear_form(
    tx: optax.GradientTransformation, params: Params, gates: tuple[str, ...] = ("eta", "alpha", "mu")
) -> ChunkForm | None:
    """The chunk form of an element-wise linear transformation, or None if `tx` is anything else.

    Args:
        tx: any optax transformation.
        params: the weights it will see, a tree of arrays or shapes.
        gates: names of the per-token extra arguments that it will be given.
    """
    leaves, treedef = jax.tree.flatten(params)
    shapes = [x.shape for x in leaves]
    if not leaves or not all(x.size and x.ndim > 1 and jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
        return None
    rule = _Rule(optax.with_extra_args_support(tx), treedef, shapes)
    small = rule._replace(shapes=[(1,) * len(s) for s in shapes])  # for gates: numbers per token, not weights
    probes = [{name: probe.get(name, other) for name in gates} for probe, other in zip(_PROBES, _OTHER, strict=True)]
    try:
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):  # exact numbers, whatever the weights' dtype
            found = [_check(rule, small, probe) for probe in (probes if gates else probes[:1])]
    except Exception:
        # Whatever a foreign transformation does with momenta or gates it does not expect, and whatever traced
        # numbers it has closed over, the answer is the same: it has no chunk form, and the exact token loop runs it
        # (and raises what it has to say).
        return None
    constants, again = found[0], found[-1]
    if constants is None or again is None or not np.allclose(_gain(constants), _gain(again), rtol=1e-5):
        return None
    gain = _gain(constants)  # Z = gain * m, one number per weight; 0 without momentum
    has_momentum = bool(np.any(gain))

    def numbers_of(i: int, shape: tuple[int, ...], given: Gates) -> tuple[jax.Array, jax.Array, jax.Array]:
        """u_g, u_p and m_m of weight i for every token [..., C]."""
        if not gates:
            full = lambda x: jnp.full(shape, x[i], float)  # noqa: E731
            return full(constants.u_g), full(constants.u_p), full(constants.m_m)

        def one(token: dict) -> tuple[jax.Array, jax.Array, jax.Array]:
            x = small.numbers(token)
            return x.u_g[i], x.u_p[i], x.m_m[i]

        per_token = {name: jnp.broadcast_to(given[name], shape).reshape(-1) for name in gates}
        u_g, u_p, m_m = jax.vmap(one)(per_token)
        return u_g.reshape(shape), u_p.reshape(shape), m_m.reshape(shape)

    def recurrence(i: int, error: Outer, given: Gates) -> Recurrence:
        shape = error.key.shape[:-1]
        u_g, u_p, m_m = numbers_of(i, shape, given)
        forgets = bool(gates) or constants.u_p[i] != 0
        # the floor of alpha is one rounding below zero, within log1p, so that alpha = 0 has finite gradients
        log_alpha = jnp.log1p(jnp.maximum(u_p, float(jnp.finfo(u_p.dtype).epsneg) - 1)) if forgets else None
        log_mu = gate({"mu": m_m}, "log_mu", shape) if has_momentum else None
        return Recurrence(
            error.key, (u_g[..., None] * error.delta).astype(jnp.result_type(error.delta)), None, log_alpha, log_mu
        )

    def recurrences(errors: Any, given: Gates) -> Any:
        outers = treedef.flatten_up_to(errors)
        if not all(map(is_outer, outers)):
            kinds = sorted({type(o).__name__ for o in outers if not is_outer(o)})
            raise TypeError(f"a local level's errors must be Outer(delta, key) factors; got {', '.join(kinds)}")
        return treedef.unflatten([recurrence(i, o, given) for i, o in enumerate(outers)])

    def scale(tree: Params, factors: np.ndarray) -> list:
        return [x * float(f) for x, f in zip(jax.tree.leaves(tree), factors, strict=True)]

    def momentum(state: optax.OptState) -> Params | None:
        return treedef.unflatten(scale(state, gain)) if has_momentum else None

    def with_momentum(state: optax.OptState, z: Params) -> optax.OptState:
        return jax.tree.structure(state).unflatten(scale(z, 1 / gain)) if has_momentum else state

    return ChunkForm(recurrences, momentum, with_momentum)


def _check(rule: _Rule, small: _Rule, gates: dict) -> _Numbers | None:
    """The numbers for these gates, if they predict what the rule does and fit the recurrence."""
    slots = jax.tree.leaves(rule.state())
    if slots and [s.shape for s in slots] != rule.shapes:
        return None
    if not all(jnp.issubdtype(s.dtype, jnp.floating) for s in slots):
        return None
    x = _Numbers(*map(np.asarray, rule.numbers(gates)))
    if not _fits_recurrence(x, bool(slots)):
        return None
    if gates and not np.allclose(x, small.numbers(gates), rtol=1e-12, atol=0):
        return None
    rng = np.random.default_rng(0)
    # what only the token loop passes: a rule that reads it has no chunk form
    gram = rule.treedef.unflatten([jnp.asarray(rng.normal(size=(*s[:-1], s[-2]))) for s in rule.shapes])
    for scale in _SCALES:
        g, p = ([scale * rng.normal(size=s) for s in rule.shapes] for _ in range(2))
        m = [np.asarray(jnp.asarray(scale * rng.normal(size=s.shape), s.dtype), float) for s in slots]
        held = [jnp.asarray(a, s.dtype) for a, s in zip(m, slots, strict=True)]
        updates, kept = rule.step(list(map(jnp.asarray, g)), held, list(map(jnp.asarray, p)), {**gates, "gram": gram})
        m = m or [np.zeros(())] * len(g)
        for i, got in enumerate(updates):
            if not _is_sum(got, x.u_g[i] * g[i], x.u_m[i] * m[i], x.u_p[i] * p[i]):
                return None
        for i, got in enumerate(kept):
            if not _is_sum(got, x.m_g[i] * g[i], x.m_m[i] * m[i]):
                return None
    return x


def _is_sum(got: jax.Array, *terms: np.ndarray) -> bool:
    """Is this the sum of the terms, up to a few roundings of their sizes?"""
    close = 32 * float(jnp.finfo(got.dtype).eps) * sum(np.abs(t) for t in terms)
    want = sum(terms)
    return got.shape == np.shape(want) and bool(np.all(np.abs(np.asarray(got, float) - want) <= close))


def _gain(x: _Numbers) -> np.ndarray:
    """u_g / m_g, the factor between the transformation's momentum and the recurrence's Z; 0 without momentum."""
    m_g = np.asarray(x.m_g)
    return np.where(m_g != 0, np.asarray(x.u_g) / np.where(m_g != 0, m_g, 1.0), 0.0)


def _fits_recurrence(x: _Numbers, has_state: bool) -> bool:
    """Is alpha positive, and the state, if any, the decayed Z of every weight: u_m = m_m u_g / m_g, mu >= 0?"""
    gain = _gain(x)
    is_z = np.all(gain != 0) and np.all(x.m_m >= 0) and np.allclose(x.u_m, x.m_m * gain, rtol=1e-5, atol=1e-12)
    return bool(np.all(1 + x.u_p > 0) and (is_z or not has_state))
