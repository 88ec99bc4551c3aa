"""Objectives: what remembering means (spec 2.2). Each gives a loss and its error at the memory's output.

The error is written out rather than differentiated, because the inner gradient of a level is built from it;
tests hold it against `jax.grad` of the loss. All regression losses carry the factor 1/2 (or 1/p).
"""

import jax
import jax.numpy as jnp

from hope_jax.types import Objective

dot_product = Objective(
    loss=lambda y, v: -jnp.sum(y * v, axis=-1),
    delta=lambda y, v: -v,
)
"""loss -<y, v>, delta -v: Hebbian writes, linear attention (paper (15), (64))."""


def clipped_dot_product(c: float = 1.0) -> Objective:
    """The dot product with values no longer than c, delta -v min(1, c / ||v||).

    Args:
        c: norm to which longer values are shortened, above 0.

    Raises:
        ValueError: c not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> clipped_dot_product(1.0).delta(jnp.zeros(2), jnp.array([3.0, 4.0])).round(3).tolist()
        [-0.6000000238418579, -0.800000011920929]

    Reference: the cut of `huber_norm`, on the dot product (92) of spec 7.4.
    """
    if c <= 0:
        raise ValueError(f"clipped_dot_product needs c > 0; got {c}")

    def short(v: jax.Array) -> jax.Array:
        square = jnp.sum(v * v, axis=-1, keepdims=True)
        return v * (c / jnp.sqrt(jnp.maximum(square, c * c)))

    return Objective(lambda y, v: dot_product.loss(y, short(v)), lambda y, v: dot_product.delta(y, short(v)))


l2_regression = Objective(
    loss=lambda y, v: 0.5 * jnp.sum((y - v) ** 2, axis=-1),
    delta=lambda y, v: y - v,
)
"""loss 1/2 ||y - v||^2, delta y - v: delta rule, Titans, self-modifying Titans (paper (65), (93))."""


def lp_regression(p: float, eps: float = 1e-6) -> Objective:
    """loss 1/p ||y - v||_p^p, delta sign(y - v) |y - v|^(p-1).

    For p < 2 the absolute value is smoothed, |r| -> sqrt(r^2 + eps^2), so that the outer gradient stays finite
    at zero error.

    Args:
        p: exponent, at least 1.
        eps: smoothing of |r| for p < 2.

    Raises:
        ValueError: p below 1, where the loss is not convex.

    Example:
        >>> import jax.numpy as jnp
        >>> lp_regression(4.0).delta(jnp.array([2.0]), jnp.array([0.0])).tolist()
        [8.0]

    Reference: spec 2.2; Miras (arXiv:2504.13173).
    """
    if p < 1:
        raise ValueError(f"lp_regression needs p >= 1; got {p}")
    smooth = eps if p < 2 else 0.0

    def loss(y: jax.Array, v: jax.Array) -> jax.Array:
        r = y - v
        if smooth:
            return jnp.sum((r * r + smooth**2) ** (p / 2), axis=-1) / p
        return jnp.sum(jnp.abs(r) ** p, axis=-1) / p

    def delta(y: jax.Array, v: jax.Array) -> jax.Array:
        r = y - v
        if smooth:
            return r * (r * r + smooth**2) ** (p / 2 - 1)
        return jnp.sign(r) * jnp.abs(r) ** (p - 1) if p > 2 else r  # finite derivative at r = 0, unlike r |r|^(p-2)

    return Objective(loss, delta)


def huber(c: float = 1.0) -> Objective:
    """Element-wise Huber loss, delta clip(y - v, -c, c).

    Args:
        c: error beyond which the loss grows linearly, above 0.

    Raises:
        ValueError: c not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> huber(1.0).delta(jnp.array([3.0, 0.5]), jnp.zeros(2)).tolist()
        [1.0, 0.5]

    Reference: spec 2.2.
    """
    if c <= 0:
        raise ValueError(f"huber needs c > 0; got {c}")

    def loss(y: jax.Array, v: jax.Array) -> jax.Array:
        r = jnp.abs(y - v)
        inside = jnp.minimum(r, c)
        return jnp.sum(0.5 * inside**2 + c * (r - inside), axis=-1)

    return Objective(loss, lambda y, v: jnp.clip(y - v, -c, c))


def huber_norm(c: float = 1.0) -> Objective:
    """Huber loss of ||y - v||, delta (y - v) min(1, c / ||y - v||).

    Args:
        c: norm of the error beyond which the loss grows linearly, above 0.

    Raises:
        ValueError: c not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> huber_norm(1.0).delta(jnp.array([3.0, 4.0]), jnp.zeros(2)).round(3).tolist()
        [0.6000000238418579, 0.800000011920929]

    Reference: spec 2.2.
    """
    if c <= 0:
        raise ValueError(f"huber_norm needs c > 0; got {c}")

    def norm(r: jax.Array) -> jax.Array:
        # Inside the ball the value is not used; c^2 there keeps the square root differentiable at zero error.
        square = jnp.sum(r * r, axis=-1)
        return jnp.sqrt(jnp.where(square > c * c, square, c * c))

    def loss(y: jax.Array, v: jax.Array) -> jax.Array:
        r = y - v
        square = jnp.sum(r * r, axis=-1)
        return jnp.where(square > c * c, c * norm(r) - 0.5 * c * c, 0.5 * square)

    def delta(y: jax.Array, v: jax.Array) -> jax.Array:
        r = y - v
        return r * (c / norm(r))[..., None]

    return Objective(loss, delta)
