"""The products between the keys of one tile, and the inverse of the triangular system: parallel over all tiles.

    T = diag(eta) (R^- * K K^T),   inverse = (I + T)^-1,   scores = R * Q K^T        (S5.2), (S5.3)

One warpgroup per tile of one value head. The inverse is built by doubling: with X the inverse of the blocks of b rows
on the diagonal and O the blocks of T between two neighbours of them, X - X O X holds the inverses of the blocks of 2b
rows. Every X is a part of the result, so nothing grows that is not in it; six levels for 64 rows, the first one free
because X is the identity there. Each level is two 64 x 64 x 64 products of a float32 X, in `parts` bfloat16 numbers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hope_kernels.delta_rule.pallas_gpu.gates import DOCUMENT, ETA, EXCLUSIVE, INCLUSIVE
from hope_kernels.delta_rule.pallas_gpu.parts import parts_of, transposed, write
from hope_kernels.delta_rule.pallas_gpu.warpgroup import (
    TILE,
    column,
    indices,
    launch,
    product,
    ratio,
    row,
    tile_memory,
)


def tile_products(
    q: jax.Array | None,
    k: jax.Array,
    gates: jax.Array,
    *,
    heads: int,
    erase: bool,
    decay: bool,
    reset: bool,
    before: bool,
    parts: int,
    interpret: Any,
) -> tuple[jax.Array | None, jax.Array | None]:
    """bfloat16 q, k [B, T, Hk, K] and `gates` [B, H, N, 9, C] -> inverse [B, H, N, P, C, C], scores [B, H, N, C, C]."""
    batch, tokens, key_heads, width = k.shape
    tiles = tokens // TILE
    shapes = {"inverse": (parts, TILE, TILE)} if erase else {}
    shapes |= {"scores": (TILE, TILE)} if q is not None else {}
    outputs = [jax.ShapeDtypeStruct((batch, heads, tiles, *shape), jnp.bfloat16) for shape in shapes.values()]

    def body(*refs):
        refs = list(refs)
        q_gmem = None if q is None else refs.pop(0)
        k_gmem, gates_gmem = refs.pop(0), refs.pop(0)
        out = {name: refs.pop(0) for name in shapes}
        q_smem, k_smem, gates_smem, x_smem, y_smem, ready = refs
        x, y = parts_of(x_smem), parts_of(y_smem)
        n, h, b = (lax.axis_index(axis) for axis in ("tile", "head", "batch"))
        key_head = lax.div(h, jnp.int32(heads // key_heads))
        here = (b, pl.ds(n * TILE, TILE), key_head)
        plgpu.copy_gmem_to_smem(k_gmem.at[here], k_smem, ready)
        plgpu.copy_gmem_to_smem(gates_gmem.at[b, h, n, pl.ds(0, 4)], gates_smem, ready)
        if q_gmem is not None:
            plgpu.copy_gmem_to_smem(q_gmem.at[here], q_smem, ready)
        plgpu.barrier_wait(ready)

        def gate(index, axis):
            return plgpu.load(gates_smem.at[index], layout=plgpu.Layout.WGMMA.reduce(1 - axis))

        t, i = indices((TILE, TILE), 0), indices((TILE, TILE), 1)
        same = column(gate(DOCUMENT, 0), TILE) == row(gate(DOCUMENT, 1), TILE) if reset else True
        since = gate(INCLUSIVE, 1) if decay else None

        if "scores" in out:
            keep = ((t > i) if before else (t >= i)) & same
            scores = product((TILE, TILE), (q_smem, transposed(k_smem)))
            scores *= ratio(keep, gate(EXCLUSIVE if before else INCLUSIVE, 0) if decay else None, since)
            write(y[:1], scores)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y[0], out["scores"].at[b, h, n])

        if "inverse" in out:
            system = product((TILE, TILE), (k_smem, transposed(k_smem))) * column(gate(ETA, 0), TILE)
            system *= ratio((t > i) & same, gate(EXCLUSIVE, 0) if decay else None, since)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            write(x, _inverse(system, t, i, x, y))
            plgpu.commit_smem()
            for part, ref in enumerate(x):
                plgpu.copy_smem_to_gmem(ref, out["inverse"].at[b, h, n, part])
        plgpu.wait_smem_to_gmem(0)

    arguments = ([] if q is None else [q]) + [k, gates]
    results = launch(
        body,
        name="delta_rule_products",
        grid={"tile": tiles, "head": heads, "batch": batch},
        outputs=outputs,
        scratch=[
            tile_memory(TILE, width),
            tile_memory(TILE, width),
            plgpu.SMEM((4, TILE), jnp.float32),
            tile_memory(parts, TILE, TILE),
            tile_memory(parts, TILE, TILE),
            plgpu.Barrier(num_arrivals=len(arguments)),
        ],
        interpret=interpret,
    )(*arguments)
    named = dict(zip(shapes, results, strict=True))
    return named.get("inverse"), named.get("scores")


def _inverse(system_CC: jax.Array, t: jax.Array, i: jax.Array, x: list[Any], y: list[Any]) -> jax.Array:
    """(I + T)^-1, float32; `system` is strictly lower triangular, and x and y are parts to work in."""
    apart = t ^ i  # below the diagonal: the blocks of 2b rows that t and i share have b <= apart < 2b

    def between(b: int) -> jax.Array:
        return jnp.where((apart >= b) & (apart < 2 * b), system_CC, 0.0)

    x_CC = jnp.where(t == i, 1.0, 0.0) - between(1)
    b = 2
    while b < TILE:
        write(x, x_CC)
        write(y, between(b))
        plgpu.commit_smem()
        y_CC = product((TILE, TILE), (y, x))
        write(y, y_CC)
        plgpu.commit_smem()
        x_CC -= product((TILE, TILE), (x, y))
        b *= 2
    return x_CC
