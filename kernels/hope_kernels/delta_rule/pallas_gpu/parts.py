"""A float32 matrix as the sum of its bfloat16 parts, because those are what the tensor cores multiply.

An operand of a product is a reference, or a list of references to its parts, the large one first. Two parts hold a
number to 2^-17; the product of two such matrices takes three products, the one of the small parts being below that.
"""

from typing import Any

import jax
import jax.numpy as jnp

type Operand = Any | list[Any]


def parts_of(ref: Any) -> list[Any]:
    """[P, M, N] in memory as an operand."""
    return [ref.at[part] for part in range(ref.shape[0])]


def transposed(x: Operand) -> Operand:
    """[M, N] as [N, M], without moving anything."""
    return [transposed(part) for part in x] if isinstance(x, list) else x.transpose((1, 0))


def passes(a: Operand, b: Operand) -> list[tuple[Any, Any]]:
    """The pairs of parts whose products make up a @ b."""
    a, b = (x if isinstance(x, list) else [x] for x in (a, b))
    kept = max(len(a), len(b))
    return [(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < kept]


def write(x: list[Any], value: jax.Array) -> None:
    """A float32 matrix, as exactly as the parts allow; `plgpu.commit_smem` is the caller's."""
    for ref in x:
        part = value.astype(jnp.bfloat16)
        ref[...] = part
        if ref is not x[-1]:
            value -= part.astype(jnp.float32)
