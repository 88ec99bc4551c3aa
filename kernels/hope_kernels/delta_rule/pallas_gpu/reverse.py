"""The walk back over the tiles with the cotangent of the state: the mirror image of `scan.py`.

dW = scores^T dY + diag(R_C) K dS,   dU = inverse^T dW,
dS <- gamma_C dS + Q^T diag(gamma) dY - K^T diag(eta gamma^-) dU
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from hope_kernels.delta_rule.pallas_gpu.gates import CARRY, ERASE, READ
from hope_kernels.delta_rule.pallas_gpu.parts import transposed, write
from hope_kernels.delta_rule.pallas_gpu.walk import Tile, walk
from hope_kernels.delta_rule.pallas_gpu.warpgroup import COLUMNS, TILE, column, products


class Reverse(NamedTuple):
    """What the walk back leaves behind."""

    du: jax.Array  # [B, T, H, V] bfloat16
    d_ends: jax.Array  # [B, H, N, K, V] bfloat16, the cotangent of the state after each tile
    d_state: jax.Array  # [B, H, K, V] float32


def reverse_scan(
    q: jax.Array | None,
    k: jax.Array,
    dy: jax.Array | None,
    inverse: jax.Array | None,
    scores: jax.Array | None,
    gates: jax.Array,
    d_end: jax.Array,
    *,
    decay: bool,
    columns: int,
    interpret: Any,
) -> Reverse:
    """bfloat16 q, k [B, T, Hk, K], dy [B, T, H, V], `gates` [B, H, N, 9, C], d_end [B, H, K, V]."""
    batch, heads, key_width, value_width = d_end.shape
    tokens = k.shape[1]
    bf16, f32 = jnp.bfloat16, jnp.float32

    arrays = {"k": k, "gates": gates}
    if q is not None and dy is not None and scores is not None:
        arrays |= {"q": q, "scores": scores, "dy": dy}
    if inverse is not None:
        arrays["inverse"] = inverse
    outputs = {
        "du": jax.ShapeDtypeStruct((batch, tokens, heads, value_width), bf16),
        "d_ends": jax.ShapeDtypeStruct((batch, heads, tokens // TILE, key_width, value_width), bf16),
        "end": jax.ShapeDtypeStruct(d_end.shape, f32),
    }

    def step(tile: Tile, ds_KV: jax.Array) -> jax.Array:
        given, x, du = tile.given, tile.own["x"], tile.own["du"]
        tile.send("s", "d_ends")
        (dw_CV,) = products(((TILE, COLUMNS), [(given["k"], tile.own["s"])]), interpret=interpret)
        if decay:
            dw_CV *= column(tile.gates[CARRY], COLUMNS)
        if dy is not None:
            (dw_CV,) = products((dw_CV, [(transposed(given["scores"]), given["dy"])]), interpret=interpret)
        du_CV = dw_CV
        if inverse is not None:
            write(x, dw_CV)
            plgpu.commit_smem()
            (du_CV,) = products(((TILE, COLUMNS), [(transposed(given["inverse"]), x)]), interpret=interpret)
            write(x, -column(tile.gates[ERASE], COLUMNS) * du_CV)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        du[...] = du_CV.astype(bf16)
        plgpu.commit_smem()
        tile.send("du", "du")

        if decay and dy is not None:  # in place: nobody else reads these columns
            dy_CV = plgpu.load(given["dy"], layout=plgpu.Layout.WGMMA).astype(f32)
            given["dy"][...] = (column(tile.gates[READ], COLUMNS) * dy_CV).astype(bf16)
            plgpu.commit_smem()
        pairs = [] if dy is None else [(transposed(given["q"]), given["dy"])]
        pairs += [] if inverse is None else [(transposed(given["k"]), x)]
        if decay:
            ds_KV = ds_KV * tile.whole
        if pairs:
            (ds_KV,) = products((ds_KV, pairs), interpret=interpret)
        tile.release()
        return ds_KV

    found = walk(
        step,
        d_end,
        arrays,
        outputs,
        name="delta_rule_reverse",
        divided="dy",
        own=("du",),
        columns=columns,
        backwards=True,
        interpret=interpret,
    )
    return Reverse(found["du"], found["d_ends"], found["end"])
