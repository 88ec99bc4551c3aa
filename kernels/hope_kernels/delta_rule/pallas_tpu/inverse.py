"""(I + A)^-1 for strictly lower triangular A of many heads, inside a kernel.

The matrix unit is fed whole rows of 128 lanes, so a product of two small blocks costs as much as one of two wide
ones: what counts is how many rows go through it. Therefore the diagonal blocks stand side by side: `x` [heads, b, C]
holds in the lanes of block m what a block diagonal matrix holds in the rows and lanes of block m. Joining blocks of b
rows takes two products of b rows each, for all blocks at once, instead of C.
"""

import jax
import jax.numpy as jnp

from hope_kernels.delta_rule.pallas_tpu.products import product

BASE = 16  # rows solved by substitution
_SUBLANES = 8


def unit_lower_inverse(a_GCC: jax.Array, passes: int) -> jax.Array:
    """The inverse, float32 [heads, C, C]; C is 16 times a power of two.

    Diagonal blocks of 16 rows by substitution, then twice as large ones from their halves: with X and Z the inverses of
    the diagonal blocks and A' the block of A below the first, the block of the inverse there is -Z A' X. Every
    intermediate is a true inverse of a part of the matrix: nothing grows that is not in the result.
    """
    size = a_GCC.shape[-1]
    x, rows = _substitute(a_GCC), BASE
    while rows < size:
        x, rows = _join(a_GCC, x, rows, passes), 2 * rows
    return x


def _lanes(rows: int, size: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (rows, size), 1)


def _substitute(a_GCC: jax.Array) -> jax.Array:
    """The inverses of the diagonal blocks of 16 rows, side by side [heads, 16, C]; one row after another, exact."""
    heads, size, _ = a_GCC.shape
    lanes = _lanes(_SUBLANES, size)
    block = lanes // BASE
    parts = range(0, BASE, _SUBLANES)

    def side_by_side(first: int) -> jax.Array:
        rows = [a_GCC[:, m + first : m + first + _SUBLANES] for m in range(0, size, BASE)]
        out = rows[0]
        for m in range(1, len(rows)):
            out = jnp.where(block == m, rows[m], out)
        return out

    a = [side_by_side(first) for first in parts]
    row = jax.lax.broadcasted_iota(jnp.int32, (_SUBLANES, size), 0)
    one = [jnp.where(lanes % BASE == row + first, 1.0, 0.0) for first in parts]
    x = [jnp.broadcast_to(o, (heads, _SUBLANES, size)) for o in one]
    for j in range(BASE - 1):
        solved = x[j // _SUBLANES][:, j % _SUBLANES : j % _SUBLANES + 1]
        column = jnp.broadcast_to(block * BASE + j, (heads, _SUBLANES, size)).reshape(-1, size)
        for i, first in enumerate(parts):
            if first + _SUBLANES - 1 > j:
                a_ij = jnp.take_along_axis(a[i].reshape(-1, size), column, axis=1, mode="promise_in_bounds")
                x[i] -= a_ij.reshape(heads, _SUBLANES, size) * solved
    return jnp.concatenate(x, axis=1)


def _join(a_GCC: jax.Array, x: jax.Array, rows: int, passes: int) -> jax.Array:
    """From the inverses of blocks of `rows` rows to those of twice as many."""
    size = a_GCC.shape[-1]
    block = _lanes(rows, size) // rows
    below = a_GCC[:, rows : 2 * rows]
    for m in range(3, size // rows, 2):
        below = jnp.where(block // 2 == m // 2, a_GCC[:, m * rows : (m + 1) * rows], below)
    whole = jnp.concatenate([jnp.where(block == m, x, 0.0) for m in range(size // rows)], axis=1)
    below = product(below, whole, "ij,jk", passes)
    zero = jnp.zeros_like(below)
    spread = [zero if m % 2 == 0 else jnp.where(block == m - 1, below, 0.0) for m in range(size // rows)]
    joined = product(x, jnp.concatenate(spread, axis=1), "ij,jk", passes)
    first = block % 2 == 0
    return jnp.concatenate([jnp.where(first, x, 0.0), jnp.where(first, -joined, x)], axis=1)
