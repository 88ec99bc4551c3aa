"""Walking over the tiles with a state: what `scan.py` and `reverse.py` have in common.

One block per batch entry, value head and `columns` of V; each warpgroup keeps 64 columns of the state, in float32 in
registers and in bfloat16 in shared memory, where the products read it. One more warpgroup does nothing but fetch tiles
(TMA), so that the next one arrives while this one is worked on. Columns of the state do not meet: the warpgroups only
share the tiles.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hope_kernels.delta_rule.pallas_gpu.gates import ERASE, ROWS, WHOLE
from hope_kernels.delta_rule.pallas_gpu.parts import parts_of
from hope_kernels.delta_rule.pallas_gpu.warpgroup import COLUMNS, TILE, column_gate, launch, tile_memory

STAGES = 2  # tiles in flight
_PER_TOKEN, _PER_TILE = ("k", "q"), ("scores",)  # a block's warpgroups share these, and the inverse


class Tile(NamedTuple):
    """A tile as one warpgroup meets it; `own` and `part` are its alone."""

    given: dict[str, Any]  # shared memory: "k", "q", "scores", the parts of "inverse" and the array that is divided
    own: dict[str, Any]  # shared memory, the parts of "x", and "s" the state in bfloat16
    gates: dict[int, jax.Array]  # the rows of `gates.py` from ERASE on, [C]
    whole: jax.Array  # the decay of the whole tile
    release: Callable[[], None]  # call it when nothing in `given` is needed any more
    send: Callable[[str, str], None]  # copy one of `own` to an output's place for this tile


def walk(
    step: Callable[[Tile, jax.Array], jax.Array],
    start: jax.Array,
    arrays: dict[str, jax.Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    *,
    name: str,
    divided: str,
    own: tuple[str, ...],
    columns: int,
    backwards: bool,
    interpret: Any,
) -> dict[str, jax.Array]:
    """Hand a state [K, 64] through `step(tile, state) -> state` over all tiles.

    Args:
        step: one tile for one warpgroup.
        start: [B, H, K, V] float32.
        arrays: "k", "q" [B, T, Hk, K], "scores" [B, H, N, C, C], "inverse" [B, H, N, P, C, C], "gates"
            [B, H, N, 9, C] and the array that is `divided`; those that there are.
        outputs: by name, [B, T, H, V] or [B, H, N, K, V], for `Tile.send`; and "end" for the last state.
        name: of the kernel.
        divided: the array [B, T, H, V], if it is there, that has columns of its own for every warpgroup.
        own: names of the bfloat16 [C, 64] that each warpgroup has for itself, besides "x" in P parts.
        columns: of V per block.
        backwards: the last tile comes first.
        interpret: None, or the simulator.

    Returns:
        The outputs by name.
    """
    batch, heads, key_width, value_width = start.shape
    key_heads, tiles, workers = arrays["k"].shape[2], arrays["k"].shape[1] // TILE, columns // COLUMNS
    parts = arrays["inverse"].shape[3] if "inverse" in arrays else 1
    buffers = {
        "k": tile_memory(STAGES, TILE, key_width),
        "q": tile_memory(STAGES, TILE, key_width),
        "scores": tile_memory(STAGES, TILE, TILE),
        "inverse": tile_memory(STAGES, parts, TILE, TILE),
        "gates": plgpu.SMEM((STAGES, len(ROWS) - ERASE, TILE), jnp.float32),
        divided: tile_memory(STAGES, workers, TILE, COLUMNS),
    }
    buffers = {array: buffers[array] for array in arrays}
    owned = {array: tile_memory(workers, TILE, COLUMNS) for array in own}
    owned |= {"x": tile_memory(workers, parts, TILE, COLUMNS), "s": tile_memory(workers, key_width, COLUMNS)}
    sharers = workers if divided in arrays else 0
    arrivals = len(arrays.keys() - {divided, "inverse"}) + sharers + (parts if "inverse" in arrays else 0)
    barriers = {
        "ready": plgpu.Barrier(num_barriers=STAGES, num_arrivals=arrivals),
        "free": plgpu.Barrier(num_barriers=STAGES, num_arrivals=workers),
    }

    def body(start_gmem, *refs):
        gmem = dict(zip([*arrays, *outputs], refs, strict=False))
        smem = dict(zip([*buffers, *owned, *barriers], refs[len(gmem) :], strict=True))
        v, h, b = (lax.axis_index(axis) for axis in ("slice", "head", "batch"))
        key_head = lax.div(h, jnp.int32(heads // key_heads))
        worker = lax.axis_index("wg")

        def tile_of(i):
            return tiles - 1 - i if backwards else i

        def fetch(i, slot):
            n, ready = tile_of(i), smem["ready"].at[slot]
            tokens = pl.ds(n * TILE, TILE)
            sources = {array: gmem[array].at[b, tokens, key_head] for array in _PER_TOKEN if array in buffers}
            sources |= {array: gmem[array].at[b, h, n] for array in _PER_TILE if array in buffers}
            sources["gates"] = gmem["gates"].at[b, h, n, pl.ds(ERASE, len(ROWS) - ERASE)]
            for array, source in sources.items():
                plgpu.copy_gmem_to_smem(source, smem[array].at[slot], ready)
            for part in range(parts if "inverse" in arrays else 0):
                plgpu.copy_gmem_to_smem(gmem["inverse"].at[b, h, n, part], smem["inverse"].at[slot, part], ready)
            for sharer in range(sharers):
                wanted = pl.ds(v * columns + sharer * COLUMNS, COLUMNS)
                source = gmem[divided].at[b, tokens, h, wanted]
                plgpu.copy_gmem_to_smem(source, smem[divided].at[slot, sharer], ready)

        @pl.when(worker == workers)
        def _fetcher():
            if workers > 1:
                plgpu.set_max_registers(40, action="decrease")
            for i in range(min(STAGES, tiles)):
                fetch(i, i)

            @pl.loop(0, tiles)
            def _refill(i):
                slot = lax.rem(i, jnp.int32(STAGES))
                plgpu.barrier_wait(smem["free"].at[slot])
                pl.when(i + STAGES < tiles)(lambda: fetch(i + STAGES, slot))

        @pl.when(worker < workers)
        def _worker():
            if workers > 1:
                plgpu.set_max_registers(232, action="increase")
            mine = pl.ds(v * columns + worker * COLUMNS, COLUMNS)
            private = {array: smem[array].at[worker] for array in owned}
            private["x"] = parts_of(private["x"])

            def keep(s_KV):
                private["s"][...] = s_KV.astype(jnp.bfloat16)
                plgpu.commit_smem()

            def one(i, s_KV):
                n, slot = tile_of(i), lax.rem(i, jnp.int32(STAGES))
                given = {array: smem[array].at[slot] for array in buffers}
                given |= {divided: given[divided].at[worker]} if sharers else {}
                given |= {"inverse": parts_of(given["inverse"])} if "inverse" in arrays else {}
                plgpu.barrier_wait(smem["ready"].at[slot])

                def send(source, output):
                    per_tile = len(outputs[output].shape) == 5
                    place = (b, h, n, slice(None), mine) if per_tile else (b, pl.ds(n * TILE, TILE), h, mine)
                    plgpu.copy_smem_to_gmem(private[source], gmem[output].at[place])

                tile = Tile(
                    given=given,
                    own=private,
                    gates={row: column_gate(given["gates"].at[row - ERASE]) for row in range(ERASE, WHOLE)},
                    whole=smem["gates"][slot, WHOLE - ERASE, 0],
                    release=lambda: plgpu.barrier_arrive(smem["free"].at[slot]),
                    send=send,
                )
                s_KV = step(tile, s_KV)
                keep(s_KV)
                return s_KV

            s_KV = plgpu.load(start_gmem.at[b, h, :, mine], layout=plgpu.Layout.WGMMA, optimized=False)
            keep(s_KV)
            s_KV = lax.fori_loop(0, tiles, one, s_KV)
            gmem["end"].at[b, h, :, mine][...] = s_KV
            plgpu.wait_smem_to_gmem(0)

    results = launch(
        body,
        name=name,
        grid={"slice": value_width // columns, "head": heads, "batch": batch},
        outputs=list(outputs.values()),
        scratch=[*buffers.values(), *owned.values(), *barriers.values()],
        warpgroups=workers + 1,
        interpret=interpret,
    )(start, *arrays.values())
    return dict(zip(outputs, results, strict=True))
