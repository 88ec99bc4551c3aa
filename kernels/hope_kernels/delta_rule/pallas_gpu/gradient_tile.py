"""The gradients of one tile, for 64 columns of K per warpgroup.

With M = -R^- * stril(dU W^T) and N = R * tril(dY W^T), both [C, C],

    dQ = N K + diag(gamma) dY S^T
    row = M K - diag(gamma^-) dU S^T                                 what k gets as the token that erases, but for eta
    col = (diag(eta) M)^T K + N^T Q + diag(R_C) W dS^T               what k gets as the token that is erased or read
    dK = col + diag(eta) row

and every gradient of a gate is a sum of products of rows of these with q and k (`gates.gate_gradients`). M and N are
two bfloat16 parts each unless `precision` is "fast".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hope_kernels.delta_rule.pallas_gpu.gates import BEFORE, CARRY, DOCUMENT, ETA, EXCLUSIVE, INCLUSIVE, READ
from hope_kernels.delta_rule.pallas_gpu.parts import parts_of, transposed, write
from hope_kernels.delta_rule.pallas_gpu.warpgroup import COLUMNS, TILE, column, indices, products, ratio, row, zeros

SUMS = 5
STAGES = 2  # pieces of V in flight


class Cut(NamedTuple):
    """Static facts of the kernel."""

    parts: int  # of M and N
    workers: int  # warpgroups that compute
    pieces: int  # of 64 columns of V
    lefts: tuple[str, ...]  # whose products with W^T give N ("dy") and M ("du")
    keys: tuple[str, ...]
    decay: bool
    reset: bool
    before: bool
    interpret: Any

    @property
    def alternate(self) -> bool:
        """Whether each of two warpgroups makes one of N and M."""
        return self.workers == len(self.lefts) == 2


class Block(NamedTuple):
    """A block's memory, and its place in that of the chip."""

    cut: Cut
    gmem: dict[str, Any]
    smem: dict[str, Any]
    b: jax.Array
    n: jax.Array
    h: jax.Array
    key_head: jax.Array
    first: jax.Array  # of the 64s of columns of K

    @property
    def tokens(self) -> Any:
        return pl.ds(self.n * TILE, TILE)

    def columns(self, worker: Any) -> Any:
        """The columns of K of one warpgroup."""
        return pl.ds((self.first + worker) * COLUMNS, COLUMNS)

    def gate(self, index: int, axis: int = 0) -> jax.Array:
        return plgpu.load(self.smem["gates"].at[index], layout=plgpu.Layout.WGMMA.reduce(1 - axis))


class _Totals(NamedTuple):
    """Sums over V."""

    squares: list[jax.Array]  # dY W^T and dU W^T, [C, C]; only the warpgroup's own where they alternate
    col: jax.Array  # W dS^T, [C, K]
    edges: dict[str, jax.Array]  # dY S^T and dU S^T, [C, K]
    inner_C: jax.Array  # rows of S * dS


def work(block: Block, worker: jax.Array) -> None:
    """What every other warpgroup does."""
    plgpu.set_max_registers(240, action="increase")
    cut, smem = block.cut, block.smem
    totals = _over_values(block, worker)
    plgpu.barrier_wait(smem["tile_ready"])
    for side, name in enumerate(cut.lefts):
        mine, square = (side, totals.squares[0]) if cut.alternate else (0, totals.squares[side])
        pl.when(worker == mine)(lambda name=name, square=square: _share_square(block, name, square))
    plgpu.commit_smem()
    if cut.workers > 1:
        plgpu.barrier_arrive(smem["shared"])
        plgpu.barrier_wait(smem["shared"])
    dk, dq, sums = _results(block, worker, totals)
    _send(block, worker, "dk", dk)
    if dq is not None:
        _send(block, worker, "dq", dq)
    for i in range(SUMS):
        place = (block.b, block.h, block.n, block.first + worker, i)
        block.gmem["sums"].at[place][...] = sums.get(i, _nothing())
    plgpu.wait_smem_to_gmem(0)


def _nothing() -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def _read(ref: Any) -> jax.Array:
    """Float32, in registers."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def _over_values(block: Block, worker: jax.Array) -> _Totals:
    """What needs V: the products with W^T, those of the states, and the rows of S * dS."""
    cut, smem = block.cut, block.smem
    made = [worker] if cut.alternate else list(range(len(cut.lefts)))

    def one(piece, carry):
        totals, inner_C = carry
        slot = lax.rem(piece, jnp.int32(STAGES))
        plgpu.barrier_wait(smem["ready"].at[slot])
        w, s, ds = smem["w"].at[slot], smem["starts"].at[slot, worker], smem["d_ends"].at[slot, worker]
        pairs = [(smem["lefts"].at[slot, side], transposed(w)) for side in made]
        pairs += [(w, transposed(ds))]
        pairs += [(smem["lefts"].at[slot, side], transposed(s)) for side in range(len(cut.lefts))]
        terms = [(total, [pair]) for total, pair in zip(totals, pairs, strict=True)]
        totals = products(*terms, interpret=cut.interpret)
        if cut.decay:
            inner_C += (_read(s) * _read(ds)).sum(1)
        plgpu.commit_smem()
        plgpu.barrier_arrive(smem["free"].at[slot])
        return totals, inner_C

    totals = [zeros((TILE, TILE)) for _ in made] + [zeros((TILE, COLUMNS)) for _ in range(1 + len(cut.lefts))]
    totals, inner_C = lax.fori_loop(0, cut.pieces, one, (totals, _nothing()))
    squares, (col, *edges) = totals[: len(made)], totals[len(made) :]
    return _Totals(squares, col, dict(zip(cut.lefts, edges, strict=True)), inner_C)


def _share_square(block: Block, name: str, x_CC: jax.Array) -> None:
    """Decays and the mask on a [C, C] product, then into shared memory: N, or M with and without eta."""
    cut, gate = block.cut, block.gate
    t, i = indices((TILE, TILE), 0), indices((TILE, TILE), 1)
    keep = t >= i if name == "dy" and not cut.before else t > i
    if cut.reset:
        keep &= column(gate(DOCUMENT), TILE) == row(gate(DOCUMENT, 1), TILE)
    since = EXCLUSIVE if name == "du" or cut.before else INCLUSIVE
    x_CC *= ratio(keep, gate(since) if cut.decay else None, gate(INCLUSIVE, 1) if cut.decay else None)
    if name == "dy":
        write(parts_of(block.smem["n"]), x_CC)
    else:
        write(parts_of(block.smem["m"]), -x_CC)
        write(parts_of(block.smem["em"]), -x_CC * column(gate(ETA), TILE))


def _results(
    block: Block, worker: jax.Array, totals: _Totals
) -> tuple[jax.Array, jax.Array | None, dict[int, jax.Array]]:
    """dK and dQ [C, K], and the sums by number, [C]."""
    cut, gate = block.cut, block.gate
    keys = {name: block.smem[name].at[worker] for name in cut.keys}
    square = {name: parts_of(block.smem[name]) for name in ("n", "m", "em") if name in block.smem}
    col, sums = totals.col, {}
    k_CK = _read(keys["k"])
    if cut.decay:
        col *= column(gate(CARRY), COLUMNS)
        sums[3], sums[4] = (k_CK * col).sum(1), totals.inner_C
    reads, erase = "dy" in cut.lefts, "du" in cut.lefts
    col_pairs = [(transposed(square["em"]), keys["k"])] if erase else []
    col_pairs += [(transposed(square["n"]), keys["q"])] if reads else []
    terms = [(col, col_pairs)]
    if reads:
        edge = totals.edges["dy"]
        terms.append((column(gate(READ), COLUMNS) * edge if cut.decay else edge, [(square["n"], keys["k"])]))
    if erase:
        terms.append((-column(gate(BEFORE), COLUMNS) * totals.edges["du"], [(square["m"], keys["k"])]))
    col, *rest = products(*terms, interpret=cut.interpret) if cut.lefts else [col]
    done = dict(zip(cut.lefts, rest, strict=True))
    dk = col
    if erase:
        dk += column(gate(ETA), COLUMNS) * done["du"]
        sums[1] = (k_CK * done["du"]).sum(1)
    if cut.decay:
        sums[2] = (k_CK * col).sum(1)
        if reads:
            sums[0] = (_read(keys["q"]) * done["dy"]).sum(1)
    return dk, done.get("dy"), sums


def _send(block: Block, worker: jax.Array, name: str, x_CK: jax.Array) -> None:
    """To the output of this name."""
    out = block.smem["out"].at[worker]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out[...] = x_CK.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, block.gmem[name].at[block.b, block.tokens, block.h, block.columns(worker)])
