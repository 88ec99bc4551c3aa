"""Solving (I + T) W = B for strictly lower triangular T."""

import jax
import jax.numpy as jnp

_EXACT = jax.lax.Precision.HIGHEST
_BASE = 16


def unit_lower_inverse(t_CC: jax.Array) -> jax.Array:
    """(I + T)^-1: forward substitution up to 16 rows, larger blocks joined from the inverses of their halves.

    With A and D the inverses of the two diagonal blocks and O the block below the first, the block of the inverse
    below A is -D O A. Every intermediate is a true inverse of a part of the matrix, so nothing grows that is not in
    the result; powers of T, which grow like binomials when keys repeat, never appear.
    """
    size = t_CC.shape[0]
    if size <= _BASE:
        eye = jnp.eye(size, dtype=t_CC.dtype)
        return jax.lax.linalg.triangular_solve(t_CC, eye, left_side=True, lower=True, unit_diagonal=True)
    half = _BASE
    while 2 * half < size:
        half *= 2
    first, below, second = t_CC[:half, :half], t_CC[half:, :half], t_CC[half:, half:]
    if size == 2 * half:
        a, d = jax.vmap(unit_lower_inverse)(jnp.stack([first, second]))
    else:
        a, d = unit_lower_inverse(first), unit_lower_inverse(second)
    joined = -jnp.matmul(d, jnp.matmul(below, a, precision=_EXACT), precision=_EXACT)
    return jnp.block([[a, jnp.zeros_like(joined.T)], [joined, d]])


@jax.custom_vjp
def unit_lower_solve(t_CC: jax.Array, b_CV: jax.Array) -> jax.Array:
    """W with (I + T) W = B. The inverse is formed once and serves the gradient as well."""
    return _forward(t_CC, b_CV)[0]


def _forward(t_CC, b_CV):
    inverse_CC = unit_lower_inverse(t_CC)
    w_CV = jnp.matmul(inverse_CC, b_CV, precision=_EXACT)
    return w_CV, (inverse_CC, w_CV)


def _backward(saved, dw_CV):
    """dB = (I + T)^-T dW and dT = -stril(dB W^T): the inverse itself is never differentiated."""
    inverse_CC, w_CV = saved
    db_CV = jnp.einsum("ti,tv->iv", inverse_CC, dw_CV, precision=_EXACT)
    return -jnp.tril(jnp.einsum("tv,iv->ti", db_CV, w_CV, precision=_EXACT), -1), db_CV


unit_lower_solve.defvjp(_forward, _backward)
