"""Matrix products of many heads at once, in as many bfloat16 passes as the numbers need."""

from functools import partial

import jax
import jax.numpy as jnp

_BATCHED = ((0,), (0,))


def product(a: jax.Array, b: jax.Array, contract: str, passes: int) -> jax.Array:
    """A float32 product for every head: a, b [heads, ., .].

    Args:
        a, b: bfloat16 or float32.
        contract: the letters of a and b as in einsum without the head, "ij,jk": the shared letter is summed over.
        passes: 1 rounds both to bfloat16; 3 keeps two bfloat16 parts of each and drops the product of the low parts (an
            operand that is bfloat16 has no low part, and is not split); 6 is full float32.
    """
    left, right = contract.split(",")
    (shared,) = set(left) & set(right)
    dims = (((1 + left.index(shared),), (1 + right.index(shared),)), _BATCHED)
    dot = partial(jax.lax.dot_general, dimension_numbers=dims, preferred_element_type=jnp.float32)
    if passes == 6:
        return dot(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    if passes == 1:
        return dot(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    total = dot(a_high, b_high)
    if a_low is not None:
        total += dot(a_low, b_high)
    if b_low is not None:
        total += dot(a_high, b_low)
    return total


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The bfloat16 part of x, and that of what is left."""
    high = x.astype(jnp.bfloat16)
    return high, None if x.dtype == jnp.bfloat16 else (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
