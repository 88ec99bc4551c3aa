"""Matrix products of many heads at once, in as many bfloat16 passes as the numbers need."""

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
    return sum_of_products([(a, b)], contract, passes)


def sum_of_products(pairs: list[tuple[jax.Array, jax.Array]], contract: str, passes: int) -> jax.Array:
    """The sum of `product` over pairs. Pairs and parts stand behind one another along the shared letter: the matrix
    unit adds them up."""
    left, right = contract.split(",")
    (shared,) = set(left) & set(right)
    axes = 1 + left.index(shared), 1 + right.index(shared)
    if passes == 6:
        parts = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in pairs]
    elif passes == 1:
        parts = [(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)) for a, b in pairs]
    else:
        parts = [part for a, b in pairs for part in _parts(a, b)]
    together = [jnp.concatenate(side, axis) for side, axis in zip(zip(*parts, strict=True), axes, strict=True)]
    return jax.lax.dot_general(
        *together,
        dimension_numbers=(((axes[0],), (axes[1],)), _BATCHED),
        precision=jax.lax.Precision.HIGHEST if passes == 6 else None,
        preferred_element_type=jnp.float32,
    )


def _parts(a: jax.Array, b: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """What is multiplied in three passes, or in two or one where an operand is bfloat16."""
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    parts = [(a_high, b_high), (a_low, b_high), (a_high, b_low)]
    return [(x, y) for x, y in parts if x is not None and y is not None]


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The bfloat16 part of x, and that of what is left."""
    high = x.astype(jnp.bfloat16)
    return high, None if x.dtype == jnp.bfloat16 else (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
