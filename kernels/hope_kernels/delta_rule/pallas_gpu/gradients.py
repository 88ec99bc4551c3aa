"""The gradients of q, k and the gates: parallel over all tiles, once the walk back has left dU and dS everywhere.

What is computed stands in `gradient_tile.py`. A block does one tile for at most 128 columns of K; V passes by in pieces
of 64 columns, which one warpgroup fetches. The other one or two keep 64 columns of the results each, and share the two
[C, C] matrices through shared memory.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hope_kernels.delta_rule.pallas_gpu.gradient_tile import STAGES, SUMS, Block, Cut, work
from hope_kernels.delta_rule.pallas_gpu.warpgroup import COLUMNS, TILE, launch, tile_memory


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
    parts: int,
    interpret: Any,
) -> Gradients:
    """bfloat16 q, k [B, T, Hk, K], w, du, dy [B, T, H, V], states [B, H, N, K, V]; `parts` of the [C, C] matrices."""
    batch, heads, tiles, key_width, value_width = starts.shape
    reads = dy is not None
    cut = Cut(
        parts=parts,
        workers=min(key_width // COLUMNS, 2),
        pieces=value_width // COLUMNS,
        lefts=(*(["dy"] if reads else []), *(["du"] if erase else [])),
        keys=("k", "q") if reads else ("k",),
        decay=decay,
        reset=reset,
        before=before,
        interpret=interpret,
    )
    key_blocks = key_width // (cut.workers * COLUMNS)
    arrays = {"k": k, "gates": gates, "w": w, "starts": starts, "d_ends": d_ends}
    arrays |= {"q": q, "dy": dy} if reads else {}
    arrays |= {"du": du} if erase else {}
    result = jax.ShapeDtypeStruct((batch, k.shape[1], heads, key_width), jnp.bfloat16)
    sums = jax.ShapeDtypeStruct((batch, heads, tiles, key_width // COLUMNS, SUMS, TILE), jnp.float32)
    outputs = {"dk": result, "sums": sums} | ({"dq": result} if reads else {})
    memory = _memory(cut, gates.shape[3])

    def body(*refs):
        gmem = dict(zip([*arrays, *outputs], refs, strict=False))
        smem = dict(zip(memory, refs[len(gmem) :], strict=True))
        n, part, b = (lax.axis_index(axis) for axis in ("tile", "part", "batch"))
        h, key_block = lax.div(part, jnp.int32(key_blocks)), lax.rem(part, jnp.int32(key_blocks))
        key_head = lax.div(h, jnp.int32(heads // k.shape[2]))
        worker = lax.axis_index("wg")
        block = Block(cut, gmem, smem, b, n, h, key_head, key_block * cut.workers)
        pl.when(worker == cut.workers)(lambda: _fetch(block))
        pl.when(worker < cut.workers)(lambda: work(block, worker))

    results = launch(
        body,
        name="delta_rule_gradients",
        grid={"tile": tiles, "part": heads * key_blocks, "batch": batch},
        outputs=list(outputs.values()),
        scratch=list(memory.values()),
        warpgroups=cut.workers + 1,
        interpret=interpret,
    )(*arrays.values())
    named = dict(zip(outputs, results, strict=True))
    return Gradients(named.get("dq"), named["dk"], named["sums"])


def _memory(cut: Cut, gate_rows: int) -> dict[str, Any]:
    """Shared memory and barriers of a block."""
    workers = cut.workers
    squares = (["n"] if "dy" in cut.lefts else []) + (["m", "em"] if "du" in cut.lefts else [])
    memory = {"w": tile_memory(STAGES, TILE, COLUMNS)}
    memory |= {"lefts": tile_memory(STAGES, len(cut.lefts), TILE, COLUMNS)} if cut.lefts else {}
    memory |= {name: tile_memory(STAGES, workers, COLUMNS, COLUMNS) for name in ("starts", "d_ends")}
    memory |= {name: tile_memory(workers, TILE, COLUMNS) for name in (*cut.keys, "out")}
    memory |= {name: tile_memory(cut.parts, TILE, TILE) for name in squares}
    memory["gates"] = plgpu.SMEM((gate_rows, TILE), jnp.float32)
    memory["ready"] = plgpu.Barrier(num_barriers=STAGES, num_arrivals=1 + len(cut.lefts) + 2 * workers)
    memory["free"] = plgpu.Barrier(num_barriers=STAGES, num_arrivals=workers)
    memory["tile_ready"] = plgpu.Barrier(num_arrivals=len(cut.keys) * workers + 1)
    memory["shared"] = plgpu.Barrier(num_arrivals=workers)
    return memory


def _fetch(block: Block) -> None:
    """What one warpgroup does: pieces of V as there is room, and after the first of them what the tile needs once."""
    plgpu.set_max_registers(24, action="decrease")
    cut, smem = block.cut, block.smem
    for piece in range(cut.pieces):
        slot = piece % STAGES
        if piece >= STAGES:
            plgpu.barrier_wait(smem["free"].at[slot])
        _fetch_piece(block, piece, slot)
        if piece == 0:
            _fetch_keys(block)
    for piece in range(max(cut.pieces - STAGES, 0), cut.pieces):
        plgpu.barrier_wait(smem["free"].at[piece % STAGES])


def _fetch_piece(block: Block, piece: int, slot: int) -> None:
    """64 columns of V."""
    cut, gmem, smem = block.cut, block.gmem, block.smem
    ready, wanted = smem["ready"].at[slot], pl.ds(piece * COLUMNS, COLUMNS)
    places = {"w": smem["w"].at[slot]}
    places |= {name: smem["lefts"].at[slot, side] for side, name in enumerate(cut.lefts)}
    for name, place in places.items():
        plgpu.copy_gmem_to_smem(gmem[name].at[block.b, block.tokens, block.h, wanted], place, ready)
    for name in ("starts", "d_ends"):
        for worker in range(cut.workers):
            source = gmem[name].at[block.b, block.h, block.n, block.columns(worker), wanted]
            plgpu.copy_gmem_to_smem(source, smem[name].at[slot, worker], ready)


def _fetch_keys(block: Block) -> None:
    """Gates, k and q."""
    ready = block.smem["tile_ready"]
    plgpu.copy_gmem_to_smem(block.gmem["gates"].at[block.b, block.h, block.n], block.smem["gates"], ready)
    for name in block.cut.keys:
        for worker in range(block.cut.workers):
            source = block.gmem[name].at[block.b, block.tokens, block.key_head, block.columns(worker)]
            plgpu.copy_gmem_to_smem(source, block.smem[name].at[worker], ready)
