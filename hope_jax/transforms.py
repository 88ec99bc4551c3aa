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
    eta_of,
    factored,
    gate,
    plain_gate,
    run_tree,
)
from hope_jax.types import Outer, Params, is_outer, leaf_name, over_tokens, path_string


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

    The rule of a memory, or the optimizer of a network's layers with the factors of `value_and_factors`.

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
        [..., K, V] with the extra argument `inputs`, a tree of the layers' inputs X [..., N, K], or `gram`, a tree of
        X^T X [..., K, K], and gates that are scalars or [..., 1, 1]: one step on the whole batch (S3.3, S3.4; from
        factors, `minibatch(dgd(...))`). With exact and decay=False its size is that of trace(gram), smaller than
        the tokens' own sizes if there are several.

    Raises:
        TypeError: a dense update without `inputs=` or `gram=`.
        ValueError: a negative learning rate, a momentum outside [0, 1), neither a learning rate nor an `eta`, a
            momentum gate that is missing, dense gates of another shape, or a leaf that is no matrix.

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

    if callable(learning_rate):
        raise TypeError("dgd's learning_rate is a number; for a schedule write optax.inject_hyperparams(dgd)(schedule)")
    if isinstance(learning_rate, Real) and not learning_rate >= 0:
        raise ValueError(f"dgd's learning_rate is a step size, at least 0; got {learning_rate}")
    known = momentum == "gate" if isinstance(momentum, str) else not isinstance(momentum, Real) or 0 <= momentum < 1
    if not known:
        raise ValueError(f'dgd\'s momentum is a number in [0, 1), "gate" or None; got {momentum!r}')

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
            eta = proximal(jnp.broadcast_to(eta_of("dgd", gates, learning_rate), error.key.shape[:-1]), error.key)
            return recurrence(error, eta, decay, gates)

        if input_leaf is None:
            return jax.tree.map(own_key, errors, is_leaf=is_outer)
        if input_leaf not in errors:
            raise ValueError(f"input_leaf={input_leaf!r} is not a weight of this memory; it has {sorted(errors)}")
        key = errors[input_leaf].key
        eta = proximal(jnp.broadcast_to(eta_of("dgd", gates, learning_rate), key.shape[:-1]), key)
        return {
            name: recurrence(e, jnp.broadcast_to(eta, e.key.shape[:-1]), decay and name == input_leaf, gates)
            for name, e in errors.items()
        }

    def init(params: Params) -> DGDState:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if jnp.ndim(leaf) < 2:
                raise ValueError(
                    f"dgd writes matrices [..., K, V]; {leaf_name(path)} has shape {jnp.shape(leaf)}. Give "
                    "it to another transformation with optax.partition; factor_labels makes the labels"
                )
        return DGDState(None if momentum is None else jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Params = None, *, gram: Any = None, inputs: Any = None, **gates: Any):
        if params is None:
            raise ValueError("dgd needs the current weights: call update(updates, state, params)")
        leaves, treedef = jax.tree.flatten(updates, is_leaf=is_outer)
        if all(map(is_outer, leaves)):
            return from_factors(updates, state, params, gates)
        grams = _grams(updates, gram, inputs)
        if momentum is not None or input_leaf is not None:
            raise TypeError(
                "dgd with momentum or input_leaf needs Outer(delta, key) factors, not dense gradients; for momentum "
                "from step to step put heavy_ball(mu) behind dgd"
            )
        steps = map(from_gram, leaves, grams, treedef.flatten_up_to(params), [gates] * len(leaves))
        return treedef.unflatten(steps), state

    def from_factors(errors: Any, state: Any, params: Params, gates: Gates):
        new, z, _ = run_tree(recurrences(errors, gates), params, state.momentum)
        updates = jax.tree.map(lambda s, p: (s - p).astype(p.dtype), new, params)
        if z is not None:  # in the dtype it was started with, so that a scan can carry it
            z = jax.tree.map(lambda z, old: z.astype(old.dtype), z, state.momentum)
        return updates, DGDState(z)

    def from_gram(g: jax.Array, a: jax.Array, s: jax.Array, gates: Gates) -> jax.Array:
        eta, alpha = jnp.asarray(eta_of("dgd", gates, learning_rate)), jnp.asarray(plain_gate(gates, "alpha", 1.0))
        for name, value in (("eta", eta), ("alpha", alpha)):
            if value.ndim not in (0, s.ndim):
                raise ValueError(f"for weights {s.shape} {name} is a scalar or [..., 1, 1]; got {value.shape}")
        if a.shape != (*s.shape[:-1], s.shape[-2]):
            raise ValueError(
                f"for weights {s.shape} key^T key has the shape {(*s.shape[:-1], s.shape[-2])}; got {a.shape}: flatten "
                "batch and time of inputs= into one axis, [..., N, K]"
            )
        pull = g
        if decay:
            pull = (alpha if decayed_erase else 1.0) * (a @ s) + g
        if exact and decay:
            wide = jnp.promote_types(s.dtype, jnp.float32)  # no solver takes less
            matrix = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=wide), a.shape) + eta * a
            step = jnp.linalg.solve(matrix.astype(wide), pull.astype(wide))
        elif exact:
            step = pull / (1 + eta * jnp.trace(a, axis1=-2, axis2=-1)[..., None, None])
        else:
            step = pull
        return ((alpha - 1) * s - eta * step).astype(s.dtype)

    form = ChunkForm(recurrences, lambda state: state.momentum, lambda state, z: DGDState(z))
    return factored(init, update, form)


def _grams(updates: Any, gram: Any, inputs: Any) -> list:
    """key^T key for each dense gradient, from trees that may go on where the updates are masked."""
    if inputs is not None and gram is not None:
        raise TypeError("dgd takes inputs= or gram=, which is made of them, not both")
    if inputs is not None:
        gram = jax.tree.map(lambda x: over_tokens(x, x), inputs)
    paths, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=is_outer)
    grams: list[Any] = [None] * len(paths)
    if gram is not None:
        masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
        own = lambda u, a: u if masked(u) else a  # noqa: E731
        stops = lambda node: is_outer(node) or masked(node)  # noqa: E731
        grams = treedef.flatten_up_to(jax.tree.map(own, updates, gram, is_leaf=stops))
    for (path, leaf), a in zip(paths, grams, strict=True):
        if a is None or is_outer(leaf):
            where = f" for {path_string(path)}" if path else ""
            raise TypeError(
                f"dgd got a dense gradient{where}: pass Outer(delta, key) factors for every leaf, as "
                "value_and_factors gives them, or inputs= with the layers' inputs, or gram= with key^T key. Inside "
                "a chain it gets gram= in a local level (objective=...); a global level takes dgd alone"
            )
    return grams


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
    if isinstance(alpha, Real) and not 0 < alpha <= 1:
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
