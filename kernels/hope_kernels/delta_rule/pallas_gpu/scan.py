"""The walk over the tiles: one pair of batch entry and value head per block, 64 columns of the state per warpgroup.

    X = U - diag(eta gamma^-) K S,   W = inverse X,   Y = diag(gamma) Q S + scores W,   S <- gamma_C S + K^T diag(R_C) W

The state is kept in registers in float32; a bfloat16 copy in shared memory is what the products read. One warpgroup
does nothing but fetch tiles (TMA), so that the next tile arrives while this one is worked on. Columns of the state do
not meet: each of the others has its own, and they only share the tiles.
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
    batch, tokens, key_heads, key_width = k.shape
    heads, value_width = u.shape[2:]
    tiles = tokens // TILE
    workers = columns // COLUMNS
    stages = 2
    late_reads = key_width > 2 * COLUMNS  # the registers of a larger state leave no room for Q S while W is made
    bf16, f32 = jnp.bfloat16, jnp.float32

    arrays = {"k": k, "u": u, "gates": gates}
    arrays |= {} if q is None else {"q": q, "scores": scores}
    arrays |= {} if inverse is None else {"inverse": inverse}
    outputs = {"end": jax.ShapeDtypeStruct(state.shape, f32)}
    reads = jax.ShapeDtypeStruct(u.shape, bf16)
    outputs |= {} if q is None else {"y": reads}
    outputs |= (
        {"starts": jax.ShapeDtypeStruct((batch, heads, tiles, key_width, value_width), bf16)} if residuals else {}
    )
    outputs |= {"w": reads} if residuals and inverse is not None else {}
    # Per tile in flight, then per warpgroup.
    buffers = {
        "k": tile_memory(stages, TILE, key_width),
        "u": tile_memory(stages, workers, TILE, COLUMNS),
        "gates": plgpu.SMEM((stages, len(ROWS) - ERASE, TILE), f32),
        "q": tile_memory(stages, TILE, key_width),
        "scores": tile_memory(stages, TILE, TILE),
        "inverse": tile_memory(stages, TILE, TILE),
    }
    buffers = {name: buffers[name] for name in arrays}
    own = {name: tile_memory(workers, TILE, COLUMNS) for name in ("x", "w")}
    own["s"] = tile_memory(workers, key_width, COLUMNS)
    barriers = {
        "ready": plgpu.Barrier(num_barriers=stages, num_arrivals=len(arrays) - 1 + workers),
        "free": plgpu.Barrier(num_barriers=stages, num_arrivals=workers),
    }

    def body(state_gmem, *refs):
        gmem = dict(zip([*arrays, *outputs], refs, strict=False))
        smem = dict(zip([*buffers, *own, *barriers], refs[len(gmem) :], strict=True))
        v, h, b = (lax.axis_index(axis) for axis in ("slice", "head", "batch"))
        key_head = lax.div(h, jnp.int32(heads // key_heads))
        worker = lax.axis_index("wg")
        scan_rows = pl.ds(ERASE, len(ROWS) - ERASE)

        def fetch(n, slot):
            tokens_n, ready = pl.ds(n * TILE, TILE), smem["ready"].at[slot]
            for name in ("k", "q"):
                if name in buffers:
                    plgpu.copy_gmem_to_smem(gmem[name].at[b, tokens_n, key_head], smem[name].at[slot], ready)
            for name in ("scores", "inverse"):
                if name in buffers:
                    plgpu.copy_gmem_to_smem(gmem[name].at[b, h, n], smem[name].at[slot], ready)
            plgpu.copy_gmem_to_smem(gmem["gates"].at[b, h, n, scan_rows], smem["gates"].at[slot], ready)
            for part in range(workers):
                wanted = pl.ds(v * columns + part * COLUMNS, COLUMNS)
                plgpu.copy_gmem_to_smem(gmem["u"].at[b, tokens_n, h, wanted], smem["u"].at[slot, part], ready)

        @pl.when(worker == workers)
        def _fetcher():
            if workers > 1:
                plgpu.set_max_registers(40, action="decrease")
            for n in range(min(stages, tiles)):
                fetch(n, n)

            @pl.loop(0, tiles)
            def _refill(n):
                slot = lax.rem(n, jnp.int32(stages))
                plgpu.barrier_wait(smem["free"].at[slot])
                pl.when(n + stages < tiles)(lambda: fetch(n + stages, slot))

        @pl.when(worker < workers)
        def _worker():
            if workers > 1:
                plgpu.set_max_registers(232, action="increase")
            mine = pl.ds(v * columns + worker * COLUMNS, COLUMNS)
            x, w, s = (smem[name].at[worker] for name in ("x", "w", "s"))

            def step(n, s_KV):
                slot = lax.rem(n, jnp.int32(stages))
                tokens_n = pl.ds(n * TILE, TILE)
                tile = {name: smem[name].at[slot] for name in buffers}
                u_n = tile["u"].at[worker]
                plgpu.barrier_wait(smem["ready"].at[slot])
                if residuals:
                    plgpu.copy_smem_to_gmem(s, gmem["starts"].at[b, h, n, :, mine])

                gates_C = {index: column_gate(tile["gates"].at[index - ERASE]) for index in range(ERASE, WHOLE)}

                w_ref = u_n
                from_state = {name: [(tile[name], s)] for name, use in (("q", q), ("k", inverse)) if use is not None}
                together = ["k"] if late_reads else list(from_state)
                terms = [((TILE, COLUMNS), from_state[name]) for name in together if name in from_state]
                read = dict(zip(together, products(*terms, interpret=interpret), strict=False)) if terms else {}
                w_CV = plgpu.load(u_n, layout=plgpu.Layout.WGMMA).astype(f32)
                if inverse is not None:
                    x[...] = (w_CV - column(gates_C[ERASE], COLUMNS) * read["k"]).astype(bf16)
                    plgpu.commit_smem()
                    (w_CV,) = products(((TILE, COLUMNS), [(tile["inverse"], x)]), interpret=interpret)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    w[...] = w_CV.astype(bf16)
                    w_ref = w
                if decay:
                    x[...] = (column(gates_C[CARRY], COLUMNS) * w_CV).astype(bf16)
                    s_KV = s_KV * smem["gates"][slot, WHOLE - ERASE, 0]
                plgpu.commit_smem()
                if "w" in outputs:
                    plgpu.copy_smem_to_gmem(w, gmem["w"].at[b, tokens_n, h, mine])
                write = (s_KV, [(transposed(tile["k"]), x if decay else w_ref)])

                def read_term(from_s):
                    return column(gates_C[READ], COLUMNS) * from_s, [(tile["scores"], w_ref)]

                y_CV = None
                if q is None:
                    (s_KV,) = products(write, interpret=interpret)
                elif late_reads:
                    (s_KV,) = products(write, interpret=interpret)
                    (from_s,) = products(((TILE, COLUMNS), from_state["q"]), interpret=interpret)
                    (y_CV,) = products(read_term(from_s), interpret=interpret)
                else:
                    s_KV, y_CV = products(write, read_term(read["q"]), interpret=interpret)
                plgpu.barrier_arrive(smem["free"].at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if y_CV is not None:
                    w[...] = y_CV.astype(bf16)
                s[...] = s_KV.astype(bf16)
                plgpu.commit_smem()
                if y_CV is not None:
                    plgpu.copy_smem_to_gmem(w, gmem["y"].at[b, tokens_n, h, mine])
                return s_KV

            s_KV = plgpu.load(state_gmem.at[b, h, :, mine], layout=plgpu.Layout.WGMMA, optimized=False)
            s[...] = s_KV.astype(bf16)
            plgpu.commit_smem()
            s_KV = lax.fori_loop(0, tiles, step, s_KV)
            gmem["end"].at[b, h, :, mine][...] = s_KV
            plgpu.wait_smem_to_gmem(0)

    results = launch(
        body,
        name="delta_rule_scan",
        grid={"slice": value_width // columns, "head": heads, "batch": batch},
        outputs=list(outputs.values()),
        scratch=[*buffers.values(), *own.values(), *barriers.values()],
        warpgroups=workers + 1,
        interpret=interpret,
    )(state, *arrays.values())
    named = dict(zip(outputs, results, strict=True))
    return Scan(named.get("y"), named["end"], named.get("starts"), named.get("w"))
