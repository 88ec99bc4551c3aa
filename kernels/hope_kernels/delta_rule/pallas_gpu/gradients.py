"""The gradients of q, k and the gates: parallel over all tiles, once the walk back has left dU and dS everywhere.

With M = -R^- * stril(dU W^T) and N = R * tril(dY W^T), both [C, C],

    dQ = N K + diag(gamma) dY S^T
    row = M K - diag(gamma^-) dU S^T                                 what k gets as the token that erases, but for eta
    col = (diag(eta) M)^T K + N^T Q + diag(R_C) W dS^T               what k gets as the token that is erased or read
    dK = col + diag(eta) row

and every gradient of a gate is a sum of products of rows of these with q and k (`gates.gate_gradients`). A block does
one tile for at most 128 columns of K; V passes by in pieces of 64 columns, which one warpgroup fetches. The other one
or two keep 64 columns of the results each, and share the two [C, C] matrices through shared memory. With `split` these
go in as a bfloat16 plus the bfloat16 of what it missed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hope_kernels.delta_rule.pallas_gpu.gates import BEFORE, CARRY, DOCUMENT, ETA, EXCLUSIVE, INCLUSIVE, READ
from hope_kernels.delta_rule.pallas_gpu.warpgroup import (
    COLUMNS,
    TILE,
    column,
    indices,
    launch,
    products,
    ratio,
    row,
    tile_memory,
    transposed,
    zeros,
)

SUMS = 5


class Gradients(NamedTuple):
    """Of one value head each; those that share a key head are still to be added."""

    dq: jax.Array | None  # [B, T, H, K] bfloat16
    dk: jax.Array  # [B, T, H, K] bfloat16
    sums: jax.Array  # [B, H, N, K / 64, 5, C] float32: q.dQ, k.row, k.col, k.(R_C W dS^T), rows of S * dS


def gradients(
    q: jax.Array | None,
    k: jax.Array,
    w: jax.Array,
    du: jax.Array,
    dy: jax.Array | None,
    starts: jax.Array,
    d_ends: jax.Array,
    gates: jax.Array,
    *,
    erase: bool,
    decay: bool,
    reset: bool,
    before: bool,
    split: bool,
    interpret: Any,
) -> Gradients:
    """bfloat16 q, k [B, T, Hk, K], w, du, dy [B, T, H, V], states [B, H, N, K, V]."""
    batch, heads, tiles, key_width, value_width = starts.shape
    key_heads = k.shape[2]
    block = min(key_width, 2 * COLUMNS)
    workers, pieces = block // COLUMNS, value_width // COLUMNS
    stages = 2
    bf16, f32 = jnp.bfloat16, jnp.float32
    reads = dy is not None

    arrays = {"k": k, "gates": gates, "w": w, "starts": starts, "d_ends": d_ends}
    arrays |= {"q": q, "dy": dy} if reads else {}
    arrays |= {"du": du} if erase else {}
    shape = jax.ShapeDtypeStruct((batch, k.shape[1], heads, key_width), bf16)
    outputs = {"dk": shape, "sums": jax.ShapeDtypeStruct((batch, heads, tiles, key_width // COLUMNS, SUMS, TILE), f32)}
    outputs |= {"dq": shape} if reads else {}

    lefts = [name for name in ("dy", "du") if name in arrays]  # their product with W^T gives N and M
    kept = [name for name in ("k", "q") if name in arrays]
    shared = (["n"] if reads else []) + (["m", "em"] if erase else [])
    halves = 2 if split else 1
    alternate = workers == len(lefts) == 2  # one of N and M each
    buffers = {"w": tile_memory(stages, TILE, COLUMNS)}
    buffers |= {"lefts": tile_memory(stages, len(lefts), TILE, COLUMNS)} if lefts else {}
    buffers |= {name: tile_memory(stages, workers, COLUMNS, COLUMNS) for name in ("starts", "d_ends")}
    buffers |= {name: tile_memory(workers, TILE, COLUMNS) for name in kept}
    buffers |= {"gates": plgpu.SMEM((gates.shape[3], TILE), f32), "out": tile_memory(workers, TILE, COLUMNS)}
    buffers |= {name: tile_memory(halves, TILE, TILE) for name in shared}
    barriers = {
        "ready": plgpu.Barrier(num_barriers=stages, num_arrivals=1 + len(lefts) + 2 * workers),
        "free": plgpu.Barrier(num_barriers=stages, num_arrivals=workers),
        "tile_ready": plgpu.Barrier(num_arrivals=len(kept) * workers + 1),
        "shared": plgpu.Barrier(num_arrivals=workers),
    }

    def body(*refs):
        gmem = dict(zip([*arrays, *outputs], refs, strict=False))
        smem = dict(zip([*buffers, *barriers], refs[len(gmem) :], strict=True))
        n, part, b = (lax.axis_index(axis) for axis in ("tile", "part", "batch"))
        h, key_block = lax.div(part, jnp.int32(key_width // block)), lax.rem(part, jnp.int32(key_width // block))
        key_head = lax.div(h, jnp.int32(heads // key_heads))
        worker = lax.axis_index("wg")
        tokens_n = pl.ds(n * TILE, TILE)

        def columns_of(part):
            return pl.ds(key_block * block + part * COLUMNS, COLUMNS)

        @pl.when(worker == workers)
        def _fetcher():
            plgpu.set_max_registers(24, action="decrease")

            for piece in range(pieces):
                slot, wanted = piece % stages, pl.ds(piece * COLUMNS, COLUMNS)
                ready = smem["ready"].at[slot]
                if piece >= stages:
                    plgpu.barrier_wait(smem["free"].at[slot])
                plgpu.copy_gmem_to_smem(gmem["w"].at[b, tokens_n, h, wanted], smem["w"].at[slot], ready)
                for side, name in enumerate(lefts):
                    plgpu.copy_gmem_to_smem(gmem[name].at[b, tokens_n, h, wanted], smem["lefts"].at[slot, side], ready)
                for name in ("starts", "d_ends"):
                    for p in range(workers):
                        states = gmem[name].at[b, h, n, columns_of(p), wanted]
                        plgpu.copy_gmem_to_smem(states, smem[name].at[slot, p], ready)
                if piece == 0:
                    plgpu.copy_gmem_to_smem(gmem["gates"].at[b, h, n], smem["gates"], smem["tile_ready"])
                    for name in kept:
                        for p in range(workers):
                            keys = gmem[name].at[b, tokens_n, key_head, columns_of(p)]
                            plgpu.copy_gmem_to_smem(keys, smem[name].at[p], smem["tile_ready"])
            for piece in range(max(pieces - stages, 0), pieces):
                plgpu.barrier_wait(smem["free"].at[piece % stages])

        @pl.when(worker < workers)
        def _worker():
            plgpu.set_max_registers(240, action="increase")
            out = smem["out"].at[worker]

            def gate(index, axis=0):
                return plgpu.load(smem["gates"].at[index], layout=plgpu.Layout.WGMMA.reduce(1 - axis))

            def store(name, x_CC):
                high = x_CC.astype(bf16)
                smem[name].at[0][...] = high
                if split:
                    smem[name].at[1][...] = (x_CC - high.astype(f32)).astype(bf16)

            def square(name, x_CC):
                """Decays and the mask on a [C, C] product, then into shared memory."""
                t, i = indices((TILE, TILE), 0), indices((TILE, TILE), 1)
                keep = t >= i if name == "dy" and not before else t > i
                if reset:
                    keep &= column(gate(DOCUMENT), TILE) == row(gate(DOCUMENT, 1), TILE)
                since = EXCLUSIVE if name == "du" or before else INCLUSIVE
                x_CC *= ratio(keep, gate(since) if decay else None, gate(INCLUSIVE, 1) if decay else None)
                if name == "dy":
                    store("n", x_CC)
                else:
                    store("m", -x_CC)
                    store("em", -x_CC * column(gate(ETA), TILE))

            made = [worker] if alternate else list(range(len(lefts)))

            def accumulate(piece, carry):
                """What needs V: the products with W^T, those of the states, and the rows of S * dS."""
                totals, inner_C = carry
                slot = lax.rem(piece, jnp.int32(stages))
                plgpu.barrier_wait(smem["ready"].at[slot])
                w_n, s, ds = smem["w"].at[slot], smem["starts"].at[slot, worker], smem["d_ends"].at[slot, worker]
                pairs = [(smem["lefts"].at[slot, side], transposed(w_n)) for side in made]
                pairs += [(w_n, transposed(ds))]
                pairs += [(smem["lefts"].at[slot, side], transposed(s)) for side in range(len(lefts))]
                work = [(total, [pair]) for total, pair in zip(totals, pairs, strict=True)]
                totals = products(*work, interpret=interpret)
                if decay:
                    both = plgpu.load(s, layout=plgpu.Layout.WGMMA).astype(f32)
                    inner_C += (both * plgpu.load(ds, layout=plgpu.Layout.WGMMA).astype(f32)).sum(1)
                plgpu.commit_smem()
                plgpu.barrier_arrive(smem["free"].at[slot])
                return totals, inner_C

            nothing_C = plgpu.layout_cast(jnp.zeros((TILE,), f32), plgpu.Layout.WGMMA.reduce(1))
            totals = [zeros((TILE, TILE)) for _ in made] + [zeros((TILE, COLUMNS)) for _ in range(1 + len(lefts))]
            totals, inner_C = lax.fori_loop(0, pieces, accumulate, (totals, nothing_C))
            squares, (col, *edges) = totals[: len(made)], totals[len(made) :]
            edges = dict(zip(lefts, edges, strict=True))

            plgpu.barrier_wait(smem["tile_ready"])
            for side, name in enumerate(lefts):
                if alternate:
                    pl.when(worker == side)(lambda name=name: square(name, squares[0]))
                else:
                    pl.when(worker == 0)(lambda name=name, side=side: square(name, squares[side]))
            plgpu.commit_smem()
            if workers > 1:
                plgpu.barrier_arrive(smem["shared"])
                plgpu.barrier_wait(smem["shared"])

            mine = {name: smem[name].at[worker] for name in kept}
            rows = {name: plgpu.load(ref, layout=plgpu.Layout.WGMMA) for name, ref in mine.items()}
            k_CK = rows["k"].astype(f32)
            sums = {}
            if decay:
                col *= column(gate(CARRY), COLUMNS)
                sums[3], sums[4] = (k_CK * col).sum(1), inner_C
            parts = range(halves)
            col_pairs = [(transposed(smem["em"].at[p]), mine["k"]) for p in parts] if erase else []
            col_pairs += [(transposed(smem["n"].at[p]), mine["q"]) for p in parts] if reads else []
            terms = [(col, col_pairs)]
            if reads:
                start = column(gate(READ), COLUMNS) * edges["dy"] if decay else edges["dy"]
                terms.append((start, [(smem["n"].at[p], mine["k"]) for p in parts]))
            if erase:
                start = -column(gate(BEFORE), COLUMNS) * edges["du"]
                terms.append((start, [(smem["m"].at[p], mine["k"]) for p in parts]))
            col, *rest = products(*terms, interpret=interpret) if lefts else [col]
            done = dict(zip(lefts, rest, strict=True))
            dk = col
            if erase:
                dk += column(gate(ETA), COLUMNS) * done["du"]
                sums[1] = (k_CK * done["du"]).sum(1)
            if decay:
                sums[2] = (k_CK * col).sum(1)
                if reads:
                    sums[0] = (rows["q"].astype(f32) * done["dy"]).sum(1)
            here = (b, tokens_n, h, columns_of(worker))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out[...] = dk.astype(bf16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, gmem["dk"].at[here])
            if reads:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out[...] = done["dy"].astype(bf16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out, gmem["dq"].at[here])
            for i in range(SUMS):
                gmem["sums"].at[b, h, n, key_block * workers + worker, i][...] = sums.get(i, nothing_C)
            plgpu.wait_smem_to_gmem(0)

    results = launch(
        body,
        name="delta_rule_gradients",
        grid={"tile": tiles, "part": heads * (key_width // block), "batch": batch},
        outputs=list(outputs.values()),
        scratch=[*buffers.values(), *barriers.values()],
        warpgroups=workers + 1,
        interpret=interpret,
    )(*arrays.values())
    named = dict(zip(outputs, results, strict=True))
    return Gradients(named.get("dq"), named["dk"], named["sums"])
