"""From factored errors to one step on the whole mini-batch (spec 3.3), for `dgd` and for any other transformation."""

from numbers import Real
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from hope_jax.types import Outer, Params, is_outer, over_tokens


def minibatch(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Give `tx` dense gradients and the extra argument `gram` in the place of factors.

    With G = X^T Delta and A = X^T X of a layer's inputs X and errors Delta, `minibatch(dgd(eta))` is the exact
    proximal step on all tokens at once, and with exact=False its first order:

        S <- (I + eta A)^-1 (S - eta G)        S <- S - eta (A S + G), stable for eta lambda_max(A) < 2

    A transformation without use for A gets ordinary gradients: `minibatch(optax.adam(1e-3))`.

    Args:
        tx: any optax transformation of dense gradients.

    Returns:
        A transformation whose updates may have `Outer` leaves ([..., C, V], [..., C, K]); other leaves go to `tx` as
        they are. Both contractions accumulate in at least float32; gradients have the weights' dtype, A is [..., K, K].

    Example:
        >>> import jax.numpy as jnp
        >>> from hope_jax import Outer, dgd
        >>> tx, params = minibatch(dgd(1.0)), {"w": jnp.zeros((2, 1))}
        >>> error = {"w": Outer(delta=-jnp.ones((3, 1)), key=jnp.array([[1.0, 0.0]] * 3))}
        >>> updates, _ = tx.update(error, tx.init(params), params)
        >>> updates["w"].tolist()
        [[0.75], [0.0]]

    Reference: spec (S3.3), (S3.4).
    """
    tx = optax.with_extra_args_support(tx)

    def gradient(error: Any, like: Any) -> Any:
        if not is_outer(error):
            return error
        return over_tokens(error.key, error.delta).astype(jnp.result_type(error.delta if like is None else like))

    def update(updates: Any, state: Any, params: Params = None, **extra: Any):
        leaves, treedef = jax.tree.flatten(updates, is_leaf=is_outer)
        if not any(map(is_outer, leaves)):
            return tx.update(updates, state, params, **extra)
        weights = [None] * len(leaves) if params is None else treedef.flatten_up_to(params)
        extra["gram"] = treedef.unflatten([over_tokens(e.key, e.key) if is_outer(e) else None for e in leaves])
        return tx.update(treedef.unflatten(map(gradient, leaves, weights)), state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def mean_factors(n: float | Literal["tokens"] = "tokens") -> optax.GradientTransformationExtraArgs:
    """Factors of a loss that is a mean: the sum's, for a step size divided by n. Put it before `dgd`.

    The errors of a mean over n tokens are n times smaller than each token's own, its inputs are not; delta gradient
    descent, which erases by its inputs, would forget n times more than it writes. Here both factors of a pair get
    their share, delta sqrt(n) and key / sqrt(n): the gradient stays what it is and key^T key is divided by n. This is
    the rule on the summed loss with eta / n.

    Args:
        n: how many terms the loss averages; "tokens", as many as reach each layer: [..., C] has C.

    Returns:
        A stateless transformation of `Outer` leaves; other leaves pass.

    Raises:
        ValueError: n that is neither positive nor "tokens".

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from hope_jax import Outer, dgd
        >>> mean, params = optax.chain(mean_factors(), dgd(4.0)), jnp.zeros((1, 1))
        >>> error = Outer(delta=-jnp.ones((4, 1)) / 4, key=jnp.ones((4, 1)))
        >>> updates, _ = mean.update(error, mean.init(params), params)
        >>> updates.tolist()  # as dgd(1.0) on -jnp.ones((4, 1)): half of what is left, four times
        [[0.9375]]

    Reference: spec 3.3, mean reduction.
    """
    if n != "tokens" and (not isinstance(n, Real) or n <= 0):
        raise ValueError(f'mean_factors(n) divides by n > 0 or by the number of "tokens"; got {n!r}')

    def share(error: Any) -> Any:
        if not is_outer(error):
            return error
        root = (error.key.shape[-2] if isinstance(n, str) else n) ** 0.5
        return Outer(error.delta * root, error.key / root)

    return optax.with_extra_args_support(
        optax.stateless(lambda updates, _: jax.tree.map(share, updates, is_leaf=is_outer))
    )


def add_delta_decay() -> optax.GradientTransformationExtraArgs:
    """Add the decay A S of delta gradient descent to any update: forget along the inputs of the batch.

    It reads A = X^T X from the extra argument `gram`, which `minibatch` gives. Before the step size it is a decoupled
    weight decay like `optax.add_decayed_weights`, along the directions that the batch writes and no others:
    `minibatch(optax.chain(add_delta_decay(), optax.sgd(eta)))` is `minibatch(dgd(eta, exact=False))`, and
    `minibatch(optax.chain(optax.scale_by_adam(), add_delta_decay(), optax.scale_by_learning_rate(eta)))` is Adam with
    the same decay.

    Returns:
        A stateless transformation; leaves whose gram is None pass.

    Raises:
        TypeError: no `gram`.
        ValueError: no weights.

    Example:
        >>> import jax.numpy as jnp
        >>> tx, params = add_delta_decay(), {"w": jnp.array([[3.0], [5.0]])}
        >>> gram = {"w": jnp.diag(jnp.array([1.0, 0.0]))}
        >>> tx.update({"w": jnp.zeros((2, 1))}, tx.init(params), params, gram=gram)[0]["w"].tolist()
        [[3.0], [0.0]]

    Reference: spec (S3.4).
    """

    def update(updates: Any, state: Any, params: Params = None, *, gram: Any = None, **extra: Any):
        del extra
        if params is None:
            raise ValueError("add_delta_decay needs the current weights: call update(updates, state, params)")
        if gram is None:
            raise TypeError(
                "add_delta_decay needs gram= with key^T key: wrap the chain it stands in as minibatch(chain)"
            )
        decay = lambda u, s, a: u if a is None else (u + a @ s).astype(u.dtype)  # noqa: E731
        leaves, treedef = jax.tree.flatten(updates)
        return treedef.unflatten(map(decay, leaves, treedef.flatten_up_to(params), treedef.flatten_up_to(gram))), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
