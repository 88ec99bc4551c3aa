"""Newton-Schulz: every singular value of a matrix towards one, by matrix products alone."""

from numbers import Integral

import jax

from hope_jax.numerics import frobenius

_QUINTIC = (3.4445, -4.7750, 2.0315)  # of Muon: steep at zero, so that five steps are enough
_ZETA = 0.25  # of (44): then it is the cubic and a pull towards the start
KINDS = ("quintic", "cubic", "eq44")


def newton_schulz(x: jax.Array, steps: int = 5, kind: str = "quintic") -> jax.Array:
    """The matrix with the singular vectors of x and singular values near one, by matrix products alone.

    After X <- X / (||X|| + 1e-7) with the Frobenius norm, `steps` times, for rows <= columns (else on the transpose):

        quintic    X <- a X + (b A + c A^2) X,  A = X X^T
        cubic      X <- 3/2 X - 1/2 A X
        eq44       X <- 3/2 X - 1/2 A X - 1/4 (X - X_0)

    Five quintic steps send every singular value in [0.01, 1] of the normalised matrix into [0.68, 1.14], and in
    [0.003, 1] into [0.68, 1.21]. The cubic converges to the polar factor, slowly for small singular values. (44) is
    gradient descent with step 1/4 on 1/2 ||X - X_0||^2 + 1/2 ||X^T X - I||^2: it sends a singular value s_0 to the root
    of 2 s^3 - s = s_0, which lies in [0.707, 1]. As an optax transformation:
    `optax.stateless_with_tree_map(lambda g, p: newton_schulz(g))`. Zero gives zero, with a finite gradient.

    Args:
        x: [..., K, V], each matrix of the leading axes on its own.
        steps: number of iterations, at least 1.
        kind: "quintic", "cubic" or "eq44".

    Returns:
        [..., K, V] in the dtype of x; only the norm is taken in float32 or wider.

    Raises:
        ValueError: an unknown kind, fewer than one step, or fewer than two axes.

    Example:
        >>> import jax.numpy as jnp
        >>> newton_schulz(jnp.diag(jnp.array([3.0, 1.0])), steps=20, kind="cubic").round(3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]

    Reference: Muon (Jordan et al. 2024); paper (44); spec 4.6.
    """
    check_newton_schulz(steps, kind)
    if x.ndim < 2:
        raise ValueError(f"newton_schulz needs matrices [..., K, V]; got shape {x.shape}")
    y = (x / (frobenius(x) + 1e-7)).astype(x.dtype)
    tall = y.shape[-2] > y.shape[-1]
    y = start = y.mT if tall else y
    a, b, c = _QUINTIC
    for _ in range(steps):
        gram = y @ y.mT
        if kind == "quintic":
            y = a * y + (b * gram + c * (gram @ gram)) @ y
        else:
            pull = _ZETA * (y - start) if kind == "eq44" else 0
            y = 1.5 * y - 0.5 * (gram @ y) - pull
    return y.mT if tall else y


def check_newton_schulz(steps: int, kind: str) -> None:
    """Raises what `newton_schulz` says of a number of steps and a kind that it does not know."""
    if kind not in KINDS:
        raise ValueError(f'newton_schulz is "quintic", "cubic" or "eq44"; got {kind!r}')
    if not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"newton_schulz takes a whole number of steps, at least 1; got {steps!r}")
