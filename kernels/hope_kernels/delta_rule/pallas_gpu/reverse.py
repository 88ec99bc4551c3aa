"""The walk back over the tiles with the cotangent of the state: the mirror image of `scan.py`, cut the same way.

dW = scores^T dY + diag(R_C) K dS,   dU = inverse^T dW,
dS <- gamma_C dS + Q^T diag(gamma) dY - K^T diag(eta gamma^-) dU
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hope_kernels.delta_rule.pallas_gpu.gates import CARRY, ERASE, READ, ROWS, WHOLE
from hope_kernels.delta_rule.pallas_gpu.warpgroup import (
    COLUMNS,
    TILE,
    column,
    column_gate,
    launch,
    products,
    tile_memory,
    transposed,
)


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
    tokens, key_heads = k.shape[1:3]
    tiles = tokens // TILE
    workers = columns // COLUMNS
    stages = 2
    bf16, f32 = jnp.bfloat16, jnp.float32

    arrays = {"k": k, "gates": gates}
    arrays |= {} if dy is None else {"q": q, "scores": scores, "dy": dy}
    arrays |= {} if inverse is None else {"inverse": inverse}
    outputs = {
        "du": jax.ShapeDtypeStruct((batch, tokens, heads, value_width), bf16),
        "d_ends": jax.ShapeDtypeStruct((batch, heads, tiles, key_width, value_width), bf16),
        "d_state": jax.ShapeDtypeStruct(d_end.shape, f32),
    }
    buffers = {
        "k": tile_memory(stages, TILE, key_width),
        "gates": plgpu.SMEM((stages, len(ROWS) - ERASE, TILE), f32),
        "q": tile_memory(stages, TILE, key_width),
        "scores": tile_memory(stages, TILE, TILE),
        "dy": tile_memory(stages, workers, TILE, COLUMNS),
        "inverse": tile_memory(stages, TILE, TILE),
    }
    buffers = {name: buffers[name] for name in arrays}
    own = {name: tile_memory(workers, TILE, COLUMNS) for name in ("x", "du")}
    own["s"] = tile_memory(workers, key_width, COLUMNS)
    arrivals = len(arrays) - (dy is not None) + (0 if dy is None else workers)
    barriers = {
        "ready": plgpu.Barrier(num_barriers=stages, num_arrivals=arrivals),
        "free": plgpu.Barrier(num_barriers=stages, num_arrivals=workers),
    }

    def body(d_end_gmem, *refs):
        gmem = dict(zip([*arrays, *outputs], refs, strict=False))
        smem = dict(zip([*buffers, *own, *barriers], refs[len(gmem) :], strict=True))
        v, h, b = (lax.axis_index(axis) for axis in ("slice", "head", "batch"))
        key_head = lax.div(h, jnp.int32(heads // key_heads))
        worker = lax.axis_index("wg")
        scan_rows = pl.ds(ERASE, len(ROWS) - ERASE)

        def fetch(step, slot):
            n, ready = tiles - 1 - step, smem["ready"].at[slot]
            tokens_n = pl.ds(n * TILE, TILE)
            for name in ("k", "q"):
                if name in buffers:
                    plgpu.copy_gmem_to_smem(gmem[name].at[b, tokens_n, key_head], smem[name].at[slot], ready)
            for name in ("scores", "inverse"):
                if name in buffers:
                    plgpu.copy_gmem_to_smem(gmem[name].at[b, h, n], smem[name].at[slot], ready)
            plgpu.copy_gmem_to_smem(gmem["gates"].at[b, h, n, scan_rows], smem["gates"].at[slot], ready)
            for part in range(workers if dy is not None else 0):
                wanted = pl.ds(v * columns + part * COLUMNS, COLUMNS)
                plgpu.copy_gmem_to_smem(gmem["dy"].at[b, tokens_n, h, wanted], smem["dy"].at[slot, part], ready)

        @pl.when(worker == workers)
        def _fetcher():
            if workers > 1:
                plgpu.set_max_registers(40, action="decrease")
            for step in range(min(stages, tiles)):
                fetch(step, step)

            @pl.loop(0, tiles)
            def _refill(step):
                slot = lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(smem["free"].at[slot])
                pl.when(step + stages < tiles)(lambda: fetch(step + stages, slot))

        @pl.when(worker < workers)
        def _worker():
            if workers > 1:
                plgpu.set_max_registers(232, action="increase")
            mine = pl.ds(v * columns + worker * COLUMNS, COLUMNS)
            x, du, s = (smem[name].at[worker] for name in ("x", "du", "s"))

            def walk(step, ds_KV):
                n, slot = tiles - 1 - step, lax.rem(step, jnp.int32(stages))
                tile = {name: smem[name].at[slot] for name in buffers}
                plgpu.barrier_wait(smem["ready"].at[slot])
                plgpu.copy_smem_to_gmem(s, gmem["d_ends"].at[b, h, n, :, mine])
                gates_C = {index: column_gate(tile["gates"].at[index - ERASE]) for index in range(ERASE, WHOLE)}
                whole = smem["gates"][slot, WHOLE - ERASE, 0]

                (dw_CV,) = products(((TILE, COLUMNS), [(tile["k"], s)]), interpret=interpret)
                if decay:
                    dw_CV *= column(gates_C[CARRY], COLUMNS)
                if dy is not None:
                    dy_n = tile["dy"].at[worker]
                    (dw_CV,) = products((dw_CV, [(transposed(tile["scores"]), dy_n)]), interpret=interpret)
                du_CV = dw_CV
                if inverse is not None:
                    x[...] = dw_CV.astype(bf16)
                    plgpu.commit_smem()
                    (du_CV,) = products(((TILE, COLUMNS), [(transposed(tile["inverse"]), x)]), interpret=interpret)
                    x[...] = (-column(gates_C[ERASE], COLUMNS) * du_CV).astype(bf16)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                du[...] = du_CV.astype(bf16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(du, gmem["du"].at[b, pl.ds(n * TILE, TILE), h, mine])

                if decay and dy is not None:  # in place: nobody else reads these columns
                    dy_n = tile["dy"].at[worker]
                    dy_CV = plgpu.load(dy_n, layout=plgpu.Layout.WGMMA).astype(f32)
                    dy_n[...] = (column(gates_C[READ], COLUMNS) * dy_CV).astype(bf16)
                    plgpu.commit_smem()
                pairs = [] if dy is None else [(transposed(tile["q"]), tile["dy"].at[worker])]
                pairs += [] if inverse is None else [(transposed(tile["k"]), x)]
                if decay:
                    ds_KV = ds_KV * whole
                if pairs:
                    (ds_KV,) = products((ds_KV, pairs), interpret=interpret)
                plgpu.barrier_arrive(smem["free"].at[slot])
                s[...] = ds_KV.astype(bf16)
                plgpu.commit_smem()
                return ds_KV

            ds_KV = plgpu.load(d_end_gmem.at[b, h, :, mine], layout=plgpu.Layout.WGMMA, optimized=False)
            s[...] = ds_KV.astype(bf16)
            plgpu.commit_smem()
            ds_KV = lax.fori_loop(0, tiles, walk, ds_KV)
            gmem["d_state"].at[b, h, :, mine][...] = ds_KV
            plgpu.wait_smem_to_gmem(0)

    results = launch(
        body,
        name="delta_rule_reverse",
        grid={"slice": value_width // columns, "head": heads, "batch": batch},
        outputs=list(outputs.values()),
        scratch=[*buffers.values(), *own.values(), *barriers.values()],
        warpgroups=workers + 1,
        interpret=interpret,
    )(d_end, *arrays.values())
    return Reverse(*results)
