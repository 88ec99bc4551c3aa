"""The backward kernel: the tiles of a cell from the last to the first, with the cotangent of the state in VMEM."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from hope_kernels.delta_rule.pallas_tpu import decay, layout
from hope_kernels.delta_rule.pallas_tpu.plan import LANES, Plan, Stream
from hope_kernels.delta_rule.pallas_tpu.products import product, sum_of_products

NAME = "delta_rule_backward"


def run(plan: Plan, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """One pass over all tiles.

    Args:
        plan: the static side of the call.
        arrays: the inputs of the forward pass but "start", what it kept ("starts", and "inverse" if there is an
            erasure), and the cotangents "dy" (if there are reads) and "d_end".

    Returns:
        "dq" (if there are reads), "dk", "du", "d_gates", "d_start". A key head that serves several cells has one part
        of its gradient from each of them.
    """
    dtype = arrays["k"].dtype
    out = {"dk": dtype, "du": dtype, "d_gates": jnp.float32, "d_start": jnp.float32}
    if plan.read:
        out = {"dq": dtype, **out}
    return layout.launch(plan, _kernel, NAME, arrays, out, backwards=True)


def _kernel(plan: Plan, inputs: tuple[str, ...], outputs: tuple[str, ...], *given) -> None:
    refs = dict(zip((*inputs, *outputs, "shifted"), given, strict=True))
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        refs["d_start"][...] = refs["d_end"][...]

    columns = decay.load_columns(plan, refs)
    for streams in plan.groups(plan.gradient_group):
        _group(plan, refs, columns, streams)


def _group(plan: Plan, refs: dict, columns: list[jax.Array], streams: list[Stream]) -> None:
    """One tile of a group of streams, (S5.5) with the roles of a key as row and as column of the system apart."""
    tile, inside, outside = plan.tile, plan.gradient_passes, plan.passes
    gates = decay.load_gates(plan, refs, columns, streams)
    k = decay.load_heads(refs["k"], streams, plan.key_width, keys=True)
    w = decay.load_heads(refs["u"], streams, plan.value_width)
    start = jnp.stack([refs["starts"][s.row, 0, s.head] for s in streams])
    d_state = jnp.stack([refs["d_start"][s.row, s.head] for s in streams])
    to_end, kept = decay.until_end(plan, gates), decay.whole_tile(plan, gates)
    now, before = decay.since_and_ratios(plan, refs["shifted"], gates, streams)
    at_read = before if plan.read == "before" else now

    # The writes W once more, and their cotangent.
    d_w = product(decay.scaled(k, to_end), d_state, "ck,kv", outside)
    # What an absent term leaves out stays None, and is not used.
    k_start: Any = None
    inverse: Any = None
    if plan.erase:
        inverse = jnp.stack([refs["inverse"][s.row, 0, s.head] for s in streams])
        k_start = decay.scaled(k, -gates.eta, before.since)
        w = product(inverse, w + product(k_start, start, "tk,kv", outside), "ti,iv", inside)
    q: Any = None
    dy: Any = None
    if plan.read:
        q = decay.load_heads(refs["q"], streams, plan.key_width, keys=True)
        dy = decay.load_heads(refs["dy"], streams, plan.value_width)
        d_w += product(at_read.ratio * product(q, k, "tk,ik", outside), dy, "ti,tv", inside)
    d_u = product(inverse, d_w, "ti,tv", inside) if plan.erase else d_w
    w, d_u = _rounded(plan, w, k), _rounded(plan, d_u, k)
    for i, s in enumerate(streams):
        refs["du"][s.row, :, s.head * plan.value_width : (s.head + 1) * plan.value_width] = d_u[i].astype(k.dtype)

    # The state: what the tile passes back, and the cotangents of what was multiplied with it.
    rows = []  # of the system, and of the reads, with their cotangents
    if plan.erase:
        rows.append((k_start, d_u))
    if plan.read:
        rows.append((decay.scaled(q, at_read.since), dy))
    kept_state = d_state if kept is None else kept * d_state
    d_start = kept_state
    d_rows: Any = None
    if rows:
        d_start += sum_of_products(rows, "ck,cv", outside)
        d_rows = product(jnp.concatenate([d.astype(k.dtype) for _, d in rows], axis=1), start, "tv,kv", outside)
    for i, s in enumerate(streams):
        refs["d_start"][s.row, s.head] = d_start[i]

    # Keys and queries. The same numbers serve rows and columns, so that their rounding cancels in the gates.
    k32 = k.astype(jnp.float32)
    d_k_end = decay.scaled(product(w, d_state, "cv,kv", outside), to_end)
    near, pairs = [], []  # the cotangents [G, C, C] of the products with k; what they are multiplied with transposed
    if plan.erase:
        near.append(_rounded(plan, -before.ratio * product(d_u, w, "tv,iv", inside), k))
        pairs.append((decay.scaled(near[0], gates.eta), k))
    if plan.read:
        near.append(_rounded(plan, at_read.ratio * product(dy, w, "tv,iv", inside), k))
        pairs.append((near[-1], q))
    d_k = d_k_end
    d_near: Any = None
    if pairs:
        d_k += sum_of_products(pairs, "ti,tk", inside)
        d_near = product(jnp.concatenate(near, axis=1), k, "ti,ik", inside)
    sums = {"total": -k32 * d_k}
    if plan.read:
        d_q = d_near[:, -tile:] + decay.scaled(d_rows[:, -tile:], at_read.since)
        _store_keys(refs["dq"], streams, d_q)
        d_read = q.astype(jnp.float32) * d_q
        sums |= {"before": d_read} if plan.read == "before" else {"total": d_read + sums["total"]}
    if plan.erase:
        d_row = d_near[:, :tile] - decay.scaled(d_rows[:, :tile], before.since)
        sums["eta"] = k32 * d_row
        d_k += decay.scaled(d_row, gates.eta)
    _store_keys(refs["dk"], streams, d_k)

    # Gates.
    at_end = jnp.sum(k32 * d_k_end, axis=1, keepdims=True).sum(axis=2, keepdims=True)
    at_end += jnp.sum(kept_state * start, axis=1, keepdims=True).sum(axis=2, keepdims=True)
    _store_gates(plan, refs["d_gates"], gates, streams, sums, at_end)


def _rounded(plan: Plan, x: jax.Array, like: jax.Array) -> jax.Array:
    """Rounded once, where every product with x would round it."""
    return x.astype(like.dtype) if plan.gradient_passes == 1 else x


def _store_gates(plan: Plan, ref, gates: decay.Gates, streams: list[Stream], sums: dict, at_end: jax.Array) -> None:
    """Store the gradients of the gates: `sums` over the key width, and what belongs to the last token."""
    rows = dict(zip(sums, _row_sums(list(sums.values())), strict=True))
    is_last = jax.lax.broadcasted_iota(jnp.int32, (1, 1, plan.tile), 2) == plan.tile - 1
    zero = jnp.zeros_like(rows["total"])
    eta = rows.get("eta", zero)
    found = {
        "total": rows["total"] + jnp.where(is_last, at_end, 0.0),
        "before": gates.eta_row * eta + rows.get("before", zero),
        "eta": eta,
    }
    for position, name in enumerate(layout.GATE_GRADIENTS):
        for i, s in enumerate(streams):
            at = position * plan.cell_heads + s.head
            ref[s.row, 0, 0, at : at + 1, :] = found[name][i]


def _row_sums(arrays_GCK: list[jax.Array]) -> list[jax.Array]:
    """[G, 1, C] for each: sums over the last axis as rows. They are laid side by side and transposed together."""
    many, tile, _ = arrays_GCK[0].shape
    columns = [column for x in arrays_GCK for column in jnp.sum(x, axis=2, keepdims=True)]
    width = -(-len(columns) // LANES) * LANES
    lane = jax.lax.broadcasted_iota(jnp.int32, (tile, width), 1)
    side_by_side = jnp.zeros((tile, width), jnp.float32)
    for n, column in enumerate(columns):
        side_by_side = jnp.where(lane == n, column, side_by_side)
    rows = [side_by_side.T[n : n + 1] for n in range(len(columns))]
    return [jnp.stack(rows[n : n + many]) for n in range(0, len(rows), many)]


def _store_keys(ref, streams: list[Stream], values: jax.Array) -> None:
    """Store the gradients of key heads: the sums over the streams that share them."""
    width = values.shape[-1]
    for key in {(s.row, s.key_head) for s in streams}:
        shared = [values[i] for i, s in enumerate(streams) if (s.row, s.key_head) == key]
        row, head = key
        ref[row, :, head * width : (head + 1) * width] = sum(shared[1:], shared[0]).astype(ref.dtype)
