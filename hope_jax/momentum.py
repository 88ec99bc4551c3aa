"""Momentum is a memory whose data are gradients: ready optimizers that differ in what it stores and how it is read.

    preconditioned_momentum   m <- alpha m - eta P(g)                    the dot-product memory
    delta_momentum            m <- alpha m - eta g (g^T m) - eta P(g)    the regression: forgets along the gradient
    feature_momentum          m <- alpha m - eta P(phi(g))               its keys go through a feature map
    output_momentum           m <- alpha m - P(g), and eta sigma(m) is the update    it is read through a function

In all but the last m is the update. As inner rules of a level they take the extra arguments `eta` and `mu` (or
`log_mu`) in the place of the learning rate and of alpha. A matrix is the last two axes [..., K, V] of a leaf, leading
axes are independent; a vector [K] counts as [K, 1]. What is linear in the gradient is a chain, with the chunk form of
`linear_rules.py`.
"""

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hope_jax.chunk_form import Gates, eta_of, plain_gate
from hope_jax.newton_schulz import newton_schulz
from hope_jax.numerics import frobenius, rms, wide
from hope_jax.transforms import heavy_ball
from hope_jax.types import Params, leaf_name

type Rate = float | jax.Array | optax.Schedule


def step_size(learning_rate: Rate | None, count: Any, gates: Gates, name: str) -> Any:
    """`eta_of` with a learning rate that may be a schedule."""
    return eta_of(name, gates, learning_rate(count) if callable(learning_rate) else learning_rate)


def check_rates(name: str, learning_rate: Rate | None, alpha: float, closed: bool = False) -> None:
    """Refuse a negative learning rate and a decay outside [0, 1), or [0, 1]; numbers that are traced pass."""
    if isinstance(learning_rate, Real) and not float(learning_rate) >= 0:
        raise ValueError(f"{name}'s learning_rate is a step size, at least 0; got {learning_rate}")
    if isinstance(alpha, Real) and not (0 <= alpha < 1 or (closed and alpha == 1)):
        raise ValueError(f"{name}'s alpha is the RETAINED fraction of m, in [0, 1{']' if closed else ')'}; got {alpha}")


def as_matrix(x: jax.Array) -> jax.Array:
    """[..., K, V] as it is, a vector [K] as [K, 1], a scalar as [1, 1]."""
    return x if x.ndim > 1 else x.reshape(-1, 1)


class DescentState(NamedTuple):
    count: Any  # int32[]: steps taken, None unless the learning rate is a schedule


def descent(learning_rate: Rate | None = None, name: str = "descent") -> optax.GradientTransformationExtraArgs:
    """-eta times the update: `optax.scale_by_learning_rate` with the gate `eta`, which keeps the update's dtype.

    Example:
        >>> tx = descent(0.5)
        >>> [tx.update(jnp.ones(1), tx.init(jnp.ones(1)), **gates)[0].tolist() for gates in ({}, {"eta": 0.25})]
        [[-0.5], [-0.25]]
    """

    def init(params: Params) -> Any:
        del params
        return DescentState(jnp.zeros((), jnp.int32) if callable(learning_rate) else None)

    def update(updates: Any, state: Any, params: Params = None, **gates: Any) -> tuple[Any, Any]:
        del params
        eta = step_size(learning_rate, state.count, gates, name)
        new = jax.tree.map(lambda u: (-eta * u).astype(u.dtype), updates)
        return new, DescentState(None if state.count is None else optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def preconditioned_momentum(
    learning_rate: Rate | None = None, alpha: float = 0.9, *, precondition: optax.GradientTransformation | None = None
) -> optax.GradientTransformationExtraArgs:
    """Momentum of preconditioned gradients, m <- alpha m - eta P(g).

    The gradient step on the memory's <m G^T, P>. With no P and constant eta it is
    `optax.chain(optax.trace(alpha), optax.scale(-eta))`; a schedule scales what is written, not what was.

    Args:
        learning_rate: eta, a number or a schedule; None if the extra argument `eta` gives it.
        alpha: retained fraction of m in [0, 1).
        precondition: P, a function of the gradient and its own state: any optax transformation, such as
            `optax.scale_by_rms()` or `learned_preconditioner()`. None: the identity.

    Raises:
        ValueError: a negative learning rate, alpha outside [0, 1), or no step size anywhere.

    Example:
        >>> tx, w = preconditioned_momentum(1.0, 0.5, precondition=optax.scale(2.0)), jnp.zeros(1)
        >>> u, state = tx.update(jnp.ones(1), tx.init(w), w)
        >>> tx.update(jnp.ones(1), state, w)[0].tolist()
        [-3.0]

    Reference: paper (33), (47); spec 4.1.
    """
    check_rates("preconditioned_momentum", learning_rate, alpha)
    return _momentum("preconditioned_momentum", learning_rate, alpha, precondition)


def _momentum(name: str, learning_rate: Rate | None, alpha: Any, *before: optax.GradientTransformation | None):
    return optax.chain(*(tx for tx in before if tx), descent(learning_rate, name), heavy_ball(alpha))


class LearnedPreconditionerState(NamedTuple):
    memory: Params  # P [..., V, V] for each leaf [..., K, V], float32 or wider


def unit(g: jax.Array) -> jax.Array:
    """The gradient divided by its Frobenius norm over the last two axes."""
    return g / frobenius(g)


def learned_preconditioner(
    zeta: float = 0.1, key: Callable[[jax.Array], jax.Array] | None = None
) -> optax.GradientTransformationExtraArgs:
    """A preconditioner that is itself a memory: P g, then P <- P - zeta (P g^ - g) g^^T, in columns.

    P starts as the identity and learns to give back the gradient g from its key g^, by L2 regression. It is read before
    it is written, so that the first step is not preconditioned. V^2 numbers per matrix: use it for narrow ones.

    Args:
        zeta: learning rate of P; with keys of norm 1 or less stable below 2.
        key: g [..., K, V] -> g^ of the same shape; the paper leaves it open. None divides by the norm: P tends
            to the norm of the gradients along their directions, and steps shrink faster than gradients do. With
            `newton_schulz` it is nearly a running mean of (G G^T)^(1/2).

    Raises:
        ValueError: a negative zeta.

    Example:
        >>> tx, g = learned_preconditioner(0.5), jnp.array([[2.0, 0.0]])
        >>> u, state = tx.update(g, tx.init(g))
        >>> u.tolist(), tx.update(g, state)[0].tolist()
        ([[2.0, 0.0]], [[3.0, 0.0]])

    Reference: paper (39)-(41), with index t for the printed t+1; spec 4.1.
    """
    if isinstance(zeta, Real) and not zeta >= 0:
        raise ValueError(f"learned_preconditioner's zeta is a step size, at least 0; got {zeta}")
    normalise = unit if key is None else key

    def start(p: jax.Array) -> jax.Array:
        m = wide(as_matrix(p))
        return jnp.broadcast_to(jnp.eye(m.shape[-1], dtype=m.dtype), (*m.shape[:-2], m.shape[-1], m.shape[-1]))

    def read(g: jax.Array, p: jax.Array) -> jax.Array:
        return (wide(as_matrix(g)) @ p.mT).reshape(g.shape).astype(g.dtype)

    def write(g: jax.Array, p: jax.Array) -> jax.Array:
        value = wide(as_matrix(g))
        k = normalise(value)
        return (p - zeta * ((k @ p.mT - value).mT @ k)).astype(p.dtype)

    def init(params: Params) -> Any:
        return LearnedPreconditionerState(jax.tree.map(start, params))

    def update(updates: Any, state: Any, params: Params = None, **extra: Any):
        del params, extra
        memory = jax.tree.map(write, updates, state.memory)
        return jax.tree.map(read, updates, state.memory), LearnedPreconditionerState(memory)

    return optax.GradientTransformationExtraArgs(init, update)


class DeltaMomentumState(NamedTuple):
    count: Any  # int32[]: steps taken
    momentum: Params  # like the weights
    precondition: optax.OptState


def delta_momentum(
    learning_rate: Rate | None = None,
    alpha: float = 0.9,
    *,
    step: str = "damped",
    precondition: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum that regresses: it also forgets along the gradient it writes.

        m <- alpha m - eta g (g^T m) - eta P(g)

    a gradient step with retention on 1/2 ||m G^T + P||^2, whose keys are gradients. Constant gradients settle at
    -eta g ((1 - alpha) I + eta g^T g)^-1: small ones act as in momentum, and no singular value of the update exceeds
    sqrt(eta / (1 - alpha)) / 2.

    Args:
        learning_rate: eta, a number or a schedule; None if the extra argument `eta` gives it.
        alpha: retained fraction of m in [0, 1].
        step: "damped", eta / (1 + eta ||g||^2) in the place of eta, a contraction for every g and for rank one and
            alpha = 1 the proximal step; "explicit", eta itself, stable only while eta ||g||_2^2 < 1 + alpha; "exact",
            the proximal step (I + eta g g^T)^-1 (alpha m - eta P(g)), solved on the smaller side.
        precondition: P, any optax transformation. None: the identity.

    Raises:
        ValueError: an unknown step, a negative learning rate, alpha outside [0, 1], or no step size anywhere.

    Example:
        >>> tx, w = delta_momentum(1.0, 1.0), jnp.zeros(1)
        >>> u, state = tx.update(jnp.ones(1), tx.init(w), w)
        >>> u.tolist(), tx.update(jnp.ones(1), state, w)[0].tolist()
        ([-0.5], [-0.75])

    Reference: paper (48)-(49), with the step size and the side that fit; spec 4.3.
    """
    if step not in _DELTA_STEPS:
        raise ValueError(f'delta_momentum\'s step is "damped", "explicit" or "exact"; got {step!r}')
    check_rates("delta_momentum", learning_rate, alpha, closed=True)
    before = optax.with_extra_args_support(precondition or optax.identity())

    def init(params: Params) -> Any:
        return DeltaMomentumState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), before.init(params))

    def update(updates: Any, state: Any, params: Params = None, **gates: Any):
        eta = step_size(learning_rate, state.count, gates, "delta_momentum")
        kept = plain_gate(gates, "mu", alpha)
        pushed, inner = before.update(updates, state.precondition, params, **gates)

        def leaf(g: jax.Array, pg: jax.Array, m: jax.Array) -> jax.Array:
            if not g.size:
                return m
            old, g, pg = (wide(as_matrix(x)) for x in (m, g, pg))
            new = _DELTA_STEPS[step](old, g, pg, eta, kept)
            return new.reshape(m.shape).astype(m.dtype)

        m = jax.tree.map(leaf, updates, pushed, state.momentum)
        new = DeltaMomentumState(optax.safe_increment(state.count), m, inner)
        return jax.tree.map(lambda m, g: m.astype(g.dtype), m, updates), new

    return optax.GradientTransformationExtraArgs(init, update)


def _explicit(m: jax.Array, g: jax.Array, pg: jax.Array, eta: Any, alpha: Any) -> jax.Array:
    return alpha * m - eta * (g @ (g.mT @ m) + pg)


def _damped(m: jax.Array, g: jax.Array, pg: jax.Array, eta: Any, alpha: Any) -> jax.Array:
    return _explicit(m, g, pg, eta / (1 + eta * jnp.sum(g * g, axis=(-2, -1), keepdims=True)), alpha)


def _exact(m: jax.Array, g: jax.Array, pg: jax.Array, eta: Any, alpha: Any) -> jax.Array:
    pulled = alpha * m - eta * pg
    k, v = g.shape[-2:]
    if k <= v:
        return jnp.linalg.solve(_identity(k, g) + eta * (g @ g.mT), pulled)
    return pulled - eta * (g @ jnp.linalg.solve(_identity(v, g) + eta * (g.mT @ g), g.mT @ pulled))


def _identity(n: int, like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.eye(n, dtype=like.dtype), (*like.shape[:-2], n, n))


_DELTA_STEPS = {"damped": _damped, "explicit": _explicit, "exact": _exact}


def cubic_feature(c: float = 0.1, eps: float = 1e-15) -> Callable[[jax.Array], jax.Array]:
    """phi(g) = g + c g^3 / (rms(g)^2 + eps), which stresses large entries; odd and increasing.

    Args:
        c: weight of the cube, at least 0.
        eps: against division by zero.

    Raises:
        ValueError: a negative c, with which phi would not increase.

    Example:
        >>> cubic_feature(0.5)(jnp.array([1.0, -1.0])).tolist()
        [1.5, -1.5]
    """
    if isinstance(c, Real) and not c >= 0:
        raise ValueError(f"cubic_feature's c is at least 0, so that phi increases; got {c}")

    def phi(g: jax.Array) -> jax.Array:
        return g * (1 + c * (jnp.square(g) / (rms(g) ** 2 + eps)))

    return phi


def feature_momentum(
    learning_rate: Rate | None = None,
    alpha: float = 0.9,
    *,
    phi: Callable[[jax.Array], jax.Array] | None = None,
    precondition: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum whose keys go through a feature map, m <- alpha m - eta P(phi(g)).

    Args:
        learning_rate, alpha, precondition: as in `preconditioned_momentum`.
        phi: leaf -> leaf of the same shape, odd and increasing, so that the step still descends. None:
            `cubic_feature()`.

    Raises:
        ValueError: a negative learning rate, alpha outside [0, 1), or no step size anywhere.

    Example:
        >>> tx, w = feature_momentum(1.0, phi=jnp.sign), jnp.zeros(2)
        >>> tx.update(jnp.array([3.0, -0.1]), tx.init(w), w)[0].tolist()
        [-1.0, 1.0]

    Reference: paper (51); spec 4.5.
    """
    check_rates("feature_momentum", learning_rate, alpha)
    features = _each_leaf("feature_momentum's phi", phi or cubic_feature())
    return _momentum("feature_momentum", learning_rate, alpha, features, precondition)


def output_momentum(
    learning_rate: Rate | None = None,
    alpha: float = 0.95,
    *,
    sigma: Callable[[jax.Array], jax.Array] | None = None,
    precondition: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum that is read through a function, m <- alpha m - P(g), and eta sigma(m) is the update.

    With `newton_schulz` it is Muon (`optax.contrib.muon(..., nesterov=False)` without its factor for the shape),
    with `jnp.sign` sign-momentum, with `jnp.tanh` a soft clip of m, which `optax.scale` as P brings into its range.

    Args:
        learning_rate: eta, a number or a schedule; None if the extra argument `eta` gives it.
        alpha: retained fraction of m in [0, 1).
        sigma: leaf -> leaf of the same shape. None: `newton_schulz`.
        precondition: P, any optax transformation. None: the identity.

    Raises:
        ValueError: a negative learning rate, alpha outside [0, 1), no step size anywhere, or a leaf that sigma does not
            take, such as a vector with `newton_schulz`: give it to another optimizer by `optax.partition`.

    Example:
        >>> tx, w = output_momentum(1.0, sigma=jnp.sign), jnp.zeros(2)
        >>> tx.update(jnp.array([3.0, -0.1]), tx.init(w), w)[0].tolist()
        [-1.0, 1.0]

    Reference: paper (42), (52); spec 4.5.
    """
    check_rates("output_momentum", learning_rate, alpha)
    function = newton_schulz if sigma is None else sigma
    read = _each_leaf("output_momentum's sigma", lambda trace: -function(-trace))  # m is minus the trace of P(g)
    before = () if precondition is None else (precondition,)
    return optax.chain(*before, heavy_ball(alpha), read, descent(learning_rate, "output_momentum"))


def _each_leaf(name: str, function: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformation:
    """A stateless transformation of each leaf, whose refusals name the leaf."""

    def leaf(path: Any, x: jax.Array) -> jax.Array:
        try:
            return function(x).astype(x.dtype)
        except ValueError as error:
            raise ValueError(
                f"{name} does not take {leaf_name(path)}, of shape {x.shape}: {error}. Give such leaves to "
                "another optimizer by optax.partition"
            ) from error

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(leaf, updates))
