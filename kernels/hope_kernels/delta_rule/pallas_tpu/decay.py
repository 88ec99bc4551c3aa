"""Decay ratios of a tile, and how gates and keys of a cell are spread over registers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hope_kernels.delta_rule.pallas_tpu.layout import GATES
from hope_kernels.delta_rule.pallas_tpu.plan import Plan, Stream

_NEVER = -1e30  # its exponential is zero


class Gates(NamedTuple):
    """The gates of a group of streams. Columns are spread over lanes, so that products with them cost nothing more."""

    total: jax.Array  # [G, C, W] log alpha summed up to and including token t
    before: jax.Array  # [G, C, W] and up to t - 1
    eta: jax.Array  # [G, C, W]
    total_row: jax.Array  # [G, 1, C]
    before_row: jax.Array  # [G, 1, C]
    eta_row: jax.Array  # [G, 1, C]
    alive: jax.Array | None  # [G, C, W] bool, the tile's start state reaches token t; None: always
    reaches_end: jax.Array | None  # [G, C, W] bool, token t is of the last document of the tile
    same: jax.Array | None  # [G, C, C] bool, both tokens are of the same document


def load_heads(ref, streams: list[Stream], width: int, keys: bool = False) -> jax.Array:
    """[G, C, width] out of [rows, C, heads width]."""
    numbers = [s.key_head if keys else s.head for s in streams]
    return jnp.stack([ref[s.row, :, n * width : (n + 1) * width] for s, n in zip(streams, numbers, strict=True)])


def load_gates(plan: Plan, refs: dict, columns: list[jax.Array], streams: list[Stream]) -> Gates:
    """`columns`: the transposed gates [C, R] of every batch entry of the cell."""
    width = max(plan.tile, plan.key_width)

    def column(name: str) -> jax.Array:
        first = GATES.index(name) * plan.cell_heads
        wide = [columns[s.row][:, first + s.head : first + s.head + 1] for s in streams]
        return jnp.stack([jnp.broadcast_to(c, (plan.tile, width)) for c in wide])

    def row(name: str) -> jax.Array:
        first = GATES.index(name) * plan.cell_heads
        return jnp.stack([refs["gates"][s.row, 0, 0, first + s.head : first + s.head + 1, :] for s in streams])

    alive = reaches_end = same = None
    if plan.resets:
        rows = [refs["documents"][s.row, 0] for s in streams]  # [1, C]
        document_row = jnp.stack(rows)
        document = jnp.stack([jnp.broadcast_to(r, (plan.tile, plan.tile)).T[:, :1] for r in rows])
        document_wide = jnp.broadcast_to(document, (len(streams), plan.tile, width))
        alive = document_wide == 0
        reaches_end = document_wide == document_row[:, :, -1:]
        same = document == document_row
    return Gates(
        column("total"),
        column("before"),
        column("eta"),
        row("total"),
        row("before"),
        row("eta"),
        alive,
        reaches_end,
        same,
    )


def load_columns(plan: Plan, refs: dict) -> list[jax.Array]:
    """The gates of each batch entry of the cell, transposed [C, R]."""
    return [refs["gates"][row, 0, 0].T for row in range(plan.rows)]


def ratios(plan: Plan, gates: Gates, strict: bool, shifted: bool) -> jax.Array:
    """[G, C, C]: what is left at token t of a write at token i; zero where i > t, and where i = t if `strict`.

    `shifted`: the decay up to t - 1 instead of t.
    """
    return _ratios(plan, gates.before if shifted else gates.total, gates.total_row, gates.same, strict, 0)


def ratios_transposed(plan: Plan, gates: Gates, strict: bool, shifted: bool) -> jax.Array:
    """The transpose of `ratios`, made without transposing."""
    return _ratios(plan, gates.total, gates.before_row if shifted else gates.total_row, gates.same, strict, 1)


def _ratios(plan, column, row, same, strict, transposed):
    size = plan.tile
    t = jax.lax.broadcasted_iota(jnp.int32, (size, size), transposed)
    i = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1 - transposed)
    keep = (t > i if strict else t >= i)[None]
    if same is not None:
        keep = keep & same
    if not plan.decay:
        return jnp.broadcast_to(jnp.where(keep, 1.0, 0.0), (column.shape[0], size, size))
    difference = row - column[:, :, :size] if transposed else column[:, :, :size] - row
    return jnp.exp(jnp.where(keep, difference, _NEVER))


def since_start(plan: Plan, gates: Gates, shifted: bool) -> jax.Array | None:
    """[G, C, W]: what is left of the tile's start state at token t, or at t - 1; None: all of it."""
    decay = jnp.exp(gates.before if shifted else gates.total) if plan.decay else None
    return _where(gates.alive, decay, gates.total)


def until_end(plan: Plan, gates: Gates) -> jax.Array | None:
    """[G, C, W]: what is left at the end of the tile of a write at token i; None: all of it."""
    decay = jnp.exp(gates.total_row[:, :, -1:] - gates.total) if plan.decay else None
    return _where(gates.reaches_end, decay, gates.total)


def whole_tile(plan: Plan, gates: Gates) -> jax.Array | None:
    """[G, 1, 1]: what is left of the start state at the end; None: all of it."""
    decay = jnp.exp(gates.total_row[:, :, -1:]) if plan.decay else None
    alive = None if gates.alive is None else gates.alive[:, -1:, :1]
    return _where(alive, decay, gates.total_row[:, :, -1:])


def _where(keep: jax.Array | None, factor: jax.Array | None, like: jax.Array) -> jax.Array | None:
    if keep is None:
        return factor
    return jnp.where(keep, jnp.ones_like(like) if factor is None else factor, 0.0)


def scaled(x: jax.Array, *factors: jax.Array | None) -> jax.Array:
    """x [G, C, K] times columns [G, C, W], in float32; a factor that is None is one."""
    present = [f for f in factors if f is not None]
    if not present:
        return x
    total = present[0]
    for factor in present[1:]:
        total = total * factor
    return x.astype(jnp.float32) * (total if total.shape[-1] == 1 else total[:, :, : x.shape[-1]])
