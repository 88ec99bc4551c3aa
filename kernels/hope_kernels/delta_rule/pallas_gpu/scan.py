"""The walk over the tiles:

    X = U - diag(eta gamma^-) K S,   W = inverse X,   Y = diag(gamma) Q S + scores W,   S <- gamma_C S + K^T diag(R_C) W

How the work is divided stands in `walk.py`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from hope_kernels.delta_rule.pallas_gpu.gates import CARRY, ERASE, READ
from hope_kernels.delta_rule.pallas_gpu.parts import transposed, write
from hope_kernels.delta_rule.pallas_gpu.walk import Tile, walk
from hope_kernels.delta_rule.pallas_gpu.warpgroup import COLUMNS, TILE, column, products


class Scan(NamedTuple):
    """What the walk leaves behind; None where it was not asked for."""

    y: jax.Array | None  # [B, T, H, V] bfloat16
    end: jax.Array  # [B, H, K, V] float32
    starts: jax.Array | None  # [B, H, N, K, V] bfloat16, the state before each tile
    w: jax.Array | None  # [B, T, H, V] bfloat16


def scan(
    q: jax.Array | None,
    k: jax.Array,
    u: jax.Array,
    inverse: jax.Array | None,
    scores: jax.Array | None,
    gates: jax.Array,
    state: jax.Array,
    *,
    decay: bool,
    residuals: bool,
    columns: int,
    interpret: Any,
) -> Scan:
    """bfloat16 q, k [B, T, Hk, K], u [B, T, H, V], `gates` [B, H, N, 9, C], state [B, H, K, V]; T a multiple of C.

    `columns` of V are done by one block, in warpgroups of 64.
    """
    batch, heads, key_width, value_width = state.shape
    bf16, f32 = jnp.bfloat16, jnp.float32
    late_reads = key_width > 2 * COLUMNS  # the registers of a larger state leave no room for Q S while W is made

    arrays = {"k": k, "u": u, "gates": gates}
    outputs = {"end": jax.ShapeDtypeStruct(state.shape, f32)}
    if inverse is not None:
        arrays["inverse"] = inverse
    if q is not None and scores is not None:
        arrays |= {"q": q, "scores": scores}
        outputs["y"] = jax.ShapeDtypeStruct(u.shape, bf16)
    if residuals:
        starts = (batch, heads, k.shape[1] // TILE, key_width, value_width)
        outputs["starts"] = jax.ShapeDtypeStruct(starts, bf16)
    if residuals and inverse is not None:
        outputs["w"] = jax.ShapeDtypeStruct(u.shape, bf16)

    def step(tile: Tile, s_KV: jax.Array) -> jax.Array:
        given, x, w, s = tile.given, tile.own["x"], tile.own["w"], tile.own["s"]
        if residuals:
            tile.send("s", "starts")
        together = {"k": inverse is not None, "q": q is not None and not late_reads}
        asking = [name for name, wanted in together.items() if wanted]
        terms = [((TILE, COLUMNS), [(given[name], s)]) for name in asking]
        read = dict(zip(asking, products(*terms, interpret=interpret), strict=True)) if terms else {}

        w_ref = given["u"]
        w_CV = plgpu.load(w_ref, layout=plgpu.Layout.WGMMA).astype(f32)
        if inverse is not None:
            write(x, w_CV - column(tile.gates[ERASE], COLUMNS) * read["k"])
            plgpu.commit_smem()
            (w_CV,) = products(((TILE, COLUMNS), [(given["inverse"], x)]), interpret=interpret)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            w[...] = w_CV.astype(bf16)
            w_ref = w
        if decay:
            write(x, column(tile.gates[CARRY], COLUMNS) * w_CV)
            s_KV = s_KV * tile.whole
        plgpu.commit_smem()
        if "w" in outputs:
            tile.send("w", "w")
        added = (s_KV, [(transposed(given["k"]), x if decay else w_ref)])

        def read_term(from_s: jax.Array) -> Any:
            return column(tile.gates[READ], COLUMNS) * from_s, [(given["scores"], w_ref)]

        y_CV = None
        if q is None:
            (s_KV,) = products(added, interpret=interpret)
        elif late_reads:
            (s_KV,) = products(added, interpret=interpret)
            (from_s,) = products(((TILE, COLUMNS), [(given["q"], s)]), interpret=interpret)
            (y_CV,) = products(read_term(from_s), interpret=interpret)
        else:
            s_KV, y_CV = products(added, read_term(read["q"]), interpret=interpret)
        tile.release()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if y_CV is not None:
            w[...] = y_CV.astype(bf16)
            plgpu.commit_smem()
            tile.send("w", "y")
        return s_KV

    found = walk(
        step,
        state,
        arrays,
        outputs,
        name="delta_rule_scan",
        divided="u",
        own=("w",),
        columns=columns,
        backwards=False,
        interpret=interpret,
    )
    return Scan(found.get("y"), found["end"], found.get("starts"), found.get("w"))
