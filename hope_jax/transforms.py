"""Rules: how a memory is written. Ordinary optax transformations; use any other optax transformation beside them.

`dgd` takes factored errors (`Outer`); `retention` and `heavy_ball` are linear transforms that compose with
`optax.sgd` in an `optax.chain`, and the chain keeps its chunk-parallel form (see `linear_rules.py`).
Per-token gates travel as the keyword-only extra arguments `eta`, `alpha`, `mu` (or `log_alpha`, `log_mu`). Everywhere
a gate that is given overrides the rule's constant, and of `log_x` and `x` the first counts.
"""

from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hope_jax.chunk_form import (
    ChunkForm,
    FactoredTransformation,
    Gates,
    Recurrence,
    factored,
    gate,
    plain_gate,
    run_tree,
)
from hope_jax.types import Outer, Params, is_outer


class DGDState(NamedTuple):
    momentum: Params | None  # like the weights [..., K, V]; None without momentum


def dgd(
    learning_rate: float | None = None,
    *,
    exact: bool = True,
    decay: bool = True,
    momentum: float | str | None = None,
    decayed_erase: bool = False,
    input_leaf: str | None = None,
) -> FactoredTransformation:
    """Delta gradient descent: gradient descent that also forgets along the direction it writes.

    One token with input k and output error d, for row vectors (S = W^T):

        S <- (alpha I - eta' k k^T) S - eta' k d^T        eta' = eta / (1 + eta ||k||^2)

    which for alpha = 1 is the exact minimiser of 1/2 ||k S + d||^2 + 1/(2 eta) ||S' - S||^2. Over a chunk the
    errors are those at the chunk's start and the product over tokens runs on the weights themselves.
    With momentum the write accumulates, Z <- mu Z - eta' k d^T, and Z is what is added.

    Args:
        learning_rate: eta where no `eta` extra argument is given, at least 0.
        exact: eta' as above; False uses eta itself, as (88) is printed.
        decay: keep the k k^T term; False is plain gradient descent with the same step sizes.
        momentum: mu in [0, 1) where no `mu` extra argument is given, or "gate": one must be given. None: no
            momentum, and `mu` is ignored.
        decayed_erase: erase from the already decayed state, (I - eta' k k^T) alpha S, as Gated DeltaNet does.
        input_leaf: name of the weight whose key sets the step size for all; only that weight decays along its
            key (spec S7.6). None: each weight uses its own key (S7.7).

    Returns:
        A transformation. Updates may be a tree of `Outer` ([..., C, K] and [..., C, V], any C), with extra
        arguments `eta`, `alpha`/`log_alpha`, `mu`/`log_mu` of shape [..., C] or scalars; or dense gradients
        [..., K, V] with the extra argument `gram`, a tree of key^T key [..., K, K], and gates that are scalars or
        [..., 1, 1]: one step on the whole batch (S3.3, S3.4). With exact and decay=False its size is that of
        trace(gram), smaller than the tokens' own sizes if there are several.

    Raises:
        TypeError: a dense update without `gram=`.
        ValueError: a negative learning rate, a momentum outside [0, 1), neither a learning rate nor an `eta`, a
            momentum gate that is missing, or dense gates of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from hope_jax import Outer
        >>> tx, params = dgd(1.0), {"w": jnp.zeros((2, 1))}
        >>> error = {"w": Outer(delta=-jnp.ones((1, 1)), key=jnp.array([[1.0, 0.0]]))}
        >>> updates, _ = tx.update(error, tx.init(params), params)
        >>> updates["w"].tolist()
        [[0.5], [0.0]]

    Reference: paper (56)-(57), (88), appendix C; spec sections 3 and 7.4.
    """

    if isinstance(learning_rate, Real) and not learning_rate >= 0:
        raise ValueError(f"dgd's learning_rate is a step size, at least 0; got {learning_rate}")
    known = momentum == "gate" if isinstance(momentum, str) else not isinstance(momentum, Real) or 0 <= momentum < 1
    if not known:
        raise ValueError(f'dgd\'s momentum is a number in [0, 1), "gate" or None; got {momentum!r}')

    def eta_of(gates: Gates) -> Any:
        value = gates.get("eta")
        if value is None:
            value = learning_rate
        if value is None:
            raise ValueError("dgd needs a step size: give dgd(learning_rate) or the extra argument eta=")
        return value

    def proximal(eta: jax.Array, key: jax.Array) -> jax.Array:
        return eta / (1 + eta * jnp.sum(key * key, axis=-1)) if exact else eta

    def log_mu_of(gates: Gates, shape: tuple[int, ...]) -> jax.Array | None:
        if momentum is None:
            return None
        log_mu = gate(gates, "log_mu", shape)
        if log_mu is None and not isinstance(momentum, str):
            log_mu = gate({"mu": momentum}, "log_mu", shape)
        if log_mu is None:
            raise ValueError('dgd(momentum="gate") needs the extra argument mu= (or log_mu=)')
        return log_mu

    def recurrence(error: Outer, eta: jax.Array, decays: bool, gates: Gates) -> Recurrence:
        shape = error.key.shape[:-1]
        log_alpha = gate(gates, "log_alpha", shape)
        erase = eta if decays else None
        if erase is not None and decayed_erase and log_alpha is not None:
            erase = erase * jnp.exp(log_alpha)
        write = (-eta[..., None] * error.delta).astype(jnp.result_type(error.delta))
        return Recurrence(error.key, write, erase, log_alpha, log_mu_of(gates, shape))

    def recurrences(errors: Any, gates: Gates) -> Any:
        if not all(map(is_outer, jax.tree.leaves(errors, is_leaf=is_outer))):
            raise TypeError("dgd writes token by token: its errors must be Outer(delta, key) factors, not dense")

        def own_key(error: Outer) -> Recurrence:
            eta = proximal(jnp.broadcast_to(eta_of(gates), error.key.shape[:-1]), error.key)
            return recurrence(error, eta, decay, gates)

        if input_leaf is None:
            return jax.tree.map(own_key, errors, is_leaf=is_outer)
        if input_leaf not in errors:
            raise ValueError(f"input_leaf={input_leaf!r} is not a weight of this memory; it has {sorted(errors)}")
        key = errors[input_leaf].key
        eta = proximal(jnp.broadcast_to(eta_of(gates), key.shape[:-1]), key)
        return {
            name: recurrence(e, jnp.broadcast_to(eta, e.key.shape[:-1]), decay and name == input_leaf, gates)
            for name, e in errors.items()
        }

    def init(params: Params) -> DGDState:
        return DGDState(None if momentum is None else jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Params = None, *, gram: Any = None, **gates: Any):
        if params is None:
            raise ValueError("dgd needs the current weights: call update(updates, state, params)")
        leaves, treedef = jax.tree.flatten(updates, is_leaf=is_outer)
        if all(map(is_outer, leaves)):
            return from_factors(updates, state, params, gates)
        if gram is None:
            raise TypeError(
                "dgd got a dense gradient: pass Outer(delta, key) factors, or gram= with key^T key. Inside a chain it "
                "gets gram= in a local level (objective=...); a global level takes dgd alone"
            )
        if momentum is not None or input_leaf is not None:
            raise TypeError("dgd with momentum or input_leaf needs Outer(delta, key) factors, not dense gradients")
        steps = map(
            from_gram,
            leaves,
            treedef.flatten_up_to(gram),
            treedef.flatten_up_to(params),
            [gates] * len(leaves),
        )
        return treedef.unflatten(steps), state

    def from_factors(errors: Any, state: Any, params: Params, gates: Gates):
        new, z, _ = run_tree(recurrences(errors, gates), params, state.momentum)
        updates = jax.tree.map(lambda s, p: (s - p).astype(p.dtype), new, params)
        if z is not None:  # in the dtype it was started with, so that a scan can carry it
            z = jax.tree.map(lambda z, old: z.astype(old.dtype), z, state.momentum)
        return updates, DGDState(z)

    def from_gram(g: jax.Array, a: jax.Array, s: jax.Array, gates: Gates) -> jax.Array:
        eta, alpha = jnp.asarray(eta_of(gates)), jnp.asarray(plain_gate(gates, "alpha", 1.0))
        for name, value in (("eta", eta), ("alpha", alpha)):
            if value.ndim not in (0, s.ndim):
                raise ValueError(f"for weights {s.shape} {name} is a scalar or [..., 1, 1]; got {value.shape}")
        pull = g
        if decay:
            pull = (alpha if decayed_erase else 1.0) * (a @ s) + g
        if exact and decay:
            step = jnp.linalg.solve(jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape) + eta * a, pull)
        elif exact:
            step = pull / (1 + eta * jnp.trace(a, axis1=-2, axis2=-1)[..., None, None])
        else:
            step = pull
        return ((alpha - 1) * s - eta * step).astype(s.dtype)

    form = ChunkForm(recurrences, lambda state: state.momentum, lambda state, z: DGDState(z))
    return factored(init, update, form)


class RetentionState(NamedTuple):
    start: Params | None  # like the weights; None when the pull is to zero


def retention(alpha: float | None = None, towards: str = "zero") -> optax.GradientTransformationExtraArgs:
    """Keep the fraction alpha of the weights: adds (alpha - 1) (S - target) to the update.

    Args:
        alpha: RETAINED fraction in (0, 1] where no extra argument `alpha` (or `log_alpha`) is given.
        towards: "zero", or "start" to decay to the weights seen at `init`.

    Raises:
        ValueError: alpha outside (0, 1], an unknown target, or no alpha anywhere.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx = optax.chain(optax.sgd(0.1), retention(0.5))
        >>> w = jnp.ones(2)
        >>> tx.update(jnp.zeros(2), tx.init(w), w)[0].tolist()
        [-0.5, -0.5]

    Reference: spec 2.4; Titans' forgetting gate is 1 - alpha.
    """
    if alpha is not None and not 0 < alpha <= 1:
        raise ValueError(f"alpha is the RETAINED fraction and must lie in (0, 1]; got {alpha}")
    if towards not in ("zero", "start"):
        raise ValueError(f'retention goes towards "zero" or "start"; got {towards!r}')

    def init(params: Params) -> Any:
        return RetentionState(jax.tree.map(jnp.asarray, params) if towards == "start" else None)

    def update(updates: Any, state: Any, params: Params = None, **gates: Any):
        kept = plain_gate(gates, "alpha", alpha)
        if kept is None:
            raise ValueError("retention needs a fraction: give retention(alpha) or the extra argument alpha=")
        if params is None:
            raise ValueError("retention needs the current weights: call update(updates, state, params)")
        target = state.start if state.start is not None else jax.tree.map(jnp.zeros_like, params)
        pull = lambda u, p, t: (u + (kept - 1) * (p - t)).astype(u.dtype)  # noqa: E731
        return jax.tree.map(pull, updates, params, target), state

    return optax.GradientTransformationExtraArgs(init, update)


class HeavyBallState(NamedTuple):
    momentum: Params  # like the weights


def heavy_ball(mu: float | None = None) -> optax.GradientTransformationExtraArgs:
    """Momentum in the form of Titans: Z <- mu Z + update, and Z is the update.

    After `optax.sgd(eta)` this is S = mu S - eta grad, M = M + S (T-10). Unlike `optax.trace` it takes its decay
    per token from the extra argument `mu` (or `log_mu`).

    Args:
        mu: momentum decay in [0, 1) where no extra argument is given.

    Raises:
        ValueError: mu outside [0, 1), or no mu anywhere.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx, w = optax.chain(optax.sgd(1.0), heavy_ball(0.5)), jnp.zeros(1)
        >>> u, state = tx.update(jnp.ones(1), tx.init(w), w)
        >>> tx.update(jnp.ones(1), state, w)[0].tolist()
        [-1.5]

    Reference: Titans T-9, T-10; paper (33); spec S5.1.
    """
    if isinstance(mu, Real) and not 0 <= mu < 1:
        raise ValueError(f"mu must lie in [0, 1); got {mu}")

    def init(params: Params) -> HeavyBallState:
        return HeavyBallState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Params = None, **gates: Any):
        del params
        kept = plain_gate(gates, "mu", mu)
        if kept is None:
            raise ValueError("heavy_ball needs a decay: give heavy_ball(mu) or the extra argument mu=")
        z = jax.tree.map(lambda u, m: kept * m + u, updates, state.momentum)
        cast = lambda z, like: z.astype(like.dtype)  # noqa: E731
        return jax.tree.map(cast, z, updates), HeavyBallState(jax.tree.map(cast, z, state.momentum))

    return optax.GradientTransformationExtraArgs(init, update)


_QUINTIC = (3.4445, -4.7750, 2.0315)  # of Muon: steep at zero, so that five steps are enough


def newton_schulz(x: jax.Array, steps: int = 5, kind: str = "quintic") -> jax.Array:
    """The matrix with the singular vectors of x and singular values near one, by matrix products alone.

    After X <- X / (||X|| + 1e-7) with the Frobenius norm, `steps` times, for rows <= columns (else on the transpose):

        cubic      X <- 3/2 X - 1/2 (X X^T) X
        quintic    X <- a X + (b A + c A^2) X,  A = X X^T

    The cubic converges to the polar factor, slowly for small singular values; five quintic steps send every singular
    value in [0.01, 1] of the normalised matrix into [0.68, 1.14]. As an optax transformation:
    `optax.stateless_with_tree_map(lambda g, p: newton_schulz(g))`. Zero gives zero, with a finite gradient.

    Args:
        x: [..., K, V], each matrix of the leading axes on its own.
        steps: number of iterations.
        kind: "quintic" or "cubic".

    Returns:
        [..., K, V] in the dtype of x; only the norm is taken in float32 or wider.

    Raises:
        ValueError: an unknown kind, or fewer than two axes.

    Example:
        >>> import jax.numpy as jnp
        >>> newton_schulz(jnp.diag(jnp.array([3.0, 1.0])), steps=20, kind="cubic").round(3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    Reference: Muon (Jordan et al. 2024); paper (44); spec 4.6.
    """
    if kind not in ("quintic", "cubic"):
        raise ValueError(f'newton_schulz is "quintic" or "cubic"; got {kind!r}')
    if x.ndim < 2:
        raise ValueError(f"newton_schulz needs matrices [..., K, V]; got shape {x.shape}")
    square = jnp.sum(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))), axis=(-2, -1), keepdims=True)
    # The square root has no derivative at zero, where any norm will do.
    norm = jnp.sqrt(jnp.where(square > 0, square, 1)) + 1e-7
    y = (x / norm).astype(x.dtype)
    tall = y.shape[-2] > y.shape[-1]
    y = y.mT if tall else y
    a, b, c = _QUINTIC
    for _ in range(steps):
        gram = y @ y.mT
        y = 1.5 * y - 0.5 * (gram @ y) if kind == "cubic" else a * y + (b * gram + c * (gram @ gram)) @ y
    return y.mT if tall else y
