"""Solving (I + T) W = B for strictly lower triangular T."""

import jax
import jax.numpy as jnp

_EXACT = jax.lax.Precision.HIGHEST


def unit_lower_inverse(t_CC: jax.Array) -> jax.Array:
    """(I + T)^-1 by doubling the size of the diagonal blocks that are already inverted.

    With X the inverse of the blocks of size b and O the part of T that joins neighbours into blocks of size 2 b, the
    inverse of the larger blocks is X - X O X. Every intermediate is a true inverse of a part of the matrix, so nothing
    grows that is not in the result; powers of T, which can grow like binomials, never appear.
    """
    size = t_CC.shape[0]
    rows, columns = jnp.arange(size)[:, None], jnp.arange(size)[None, :]
    inverse = jnp.eye(size, dtype=t_CC.dtype)
    block = 1
    while block < size:
        joins = (rows // (2 * block) == columns // (2 * block)) & (rows // block > columns // block)
        off = jnp.where(joins, t_CC, 0)
        if block > 1:
            off = jnp.matmul(jnp.matmul(inverse, off, precision=_EXACT), inverse, precision=_EXACT)
        inverse -= off
        block *= 2
    return inverse


@jax.custom_vjp
def unit_lower_solve(t_CC: jax.Array, b_CV: jax.Array) -> jax.Array:
    """W with (I + T) W = B."""
    return _solve_forward(t_CC, b_CV)[0]


def _solve_forward(t_CC, b_CV):
    inverse_CC = unit_lower_inverse(t_CC)
    w_CV = jnp.matmul(inverse_CC, b_CV, precision=_EXACT)
    return w_CV, (inverse_CC, w_CV)


def _solve_backward(saved, dw_CV):
    """dB = (I + T)^-T dW and dT = -stril(dB W^T): the inverse itself is never differentiated."""
    inverse_CC, w_CV = saved
    db_CV = jnp.einsum("ti,tv->iv", inverse_CC, dw_CV, precision=_EXACT)
    return -jnp.tril(jnp.einsum("tv,iv->ti", db_CV, w_CV, precision=_EXACT), -1), db_CV


unit_lower_solve.defvjp(_solve_forward, _solve_backward)
