"""Decay ratios of a tile, and how gates and keys of a cell are spread over registers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hope_kernels.delta_rule.pallas_tpu.layout import GATES, SUBLANES
from hope_kernels.delta_rule.pallas_tpu.plan import Plan, Stream

_NEVER = -1e30  # its exponential is zero


class Decays(NamedTuple):
    """What is left at token t, or just before it, of the tile's start state and of a write at token i."""

    since: jax.Array | None  # [G, C, W]; None: all of it
    ratio: jax.Array  # [G, C, C]; zero where the write is yet to come


class Gates(NamedTuple):
    """The gates of a group of streams. Columns are spread over lanes, so that products with them cost nothing more."""

    total: jax.Array  # [G, C, W] log alpha summed up to and including token t
    eta: jax.Array  # [G, C, W]
    total_row: jax.Array  # [G, 1, C]
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
        column("eta"),
        row("total"),
        row("eta"),
        alive,
        reaches_end,
        same,
    )


def load_columns(plan: Plan, refs: dict) -> list[jax.Array]:
    """The gates of each batch entry of the cell, transposed [C, R]."""
    return [refs["gates"][row, 0, 0].T for row in range(plan.rows)]


def since_and_ratios(plan: Plan, shifted, gates: Gates, streams: list[Stream]) -> tuple[Decays, Decays]:
    """Those at every token, and those just before it: of the row above, if that is of the same document.

    Args:
        shifted: memory of the kernel, `layout.shifted_shape`.
    """
    now = Decays(_since_start(plan, gates), _ratios(plan, gates))
    own = slice(streams[0].number, streams[0].number + len(streams))
    since, ratio = now.since, _moved_down(shifted.at[0, own], now.ratio, 0.0)
    if since is not None:
        since = _moved_down(shifted.at[1, own], since, 1.0)
    if gates.same is not None:
        since, ratio = _where(gates.alive, since, gates.total), jnp.where(gates.same, ratio, 0.0)
    return now, Decays(since, ratio)


def _ratios(plan: Plan, gates: Gates) -> jax.Array:
    size = plan.tile
    t = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    i = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    keep = (t >= i)[None]
    if gates.same is not None:
        keep = keep & gates.same
    if not plan.decay:
        return jnp.broadcast_to(jnp.where(keep, 1.0, 0.0), (gates.total.shape[0], size, size))
    return jnp.exp(jnp.where(keep, gates.total[:, :, :size] - gates.total_row, _NEVER))


def _since_start(plan: Plan, gates: Gates) -> jax.Array | None:
    return _where(gates.alive, jnp.exp(gates.total) if plan.decay else None, gates.total)


def _moved_down(ref, x_GCW: jax.Array, first: float) -> jax.Array:
    """Every row one lower, and `first` in the first one: stored, and loaded from one row above."""
    _, tile, width = x_GCW.shape
    ref[:, SUBLANES : SUBLANES + tile, :width] = x_GCW
    ref[:, SUBLANES - 1 : SUBLANES, :width] = jnp.full_like(x_GCW[:, :1], first)
    return ref[:, SUBLANES - 1 : SUBLANES - 1 + tile, :width]


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
