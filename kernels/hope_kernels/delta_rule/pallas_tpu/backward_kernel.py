"""The backward kernel: the tiles of a cell from the last to the first, with the cotangent of the state in VMEM."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from hope_kernels.delta_rule.pallas_tpu import decay, layout
from hope_kernels.delta_rule.pallas_tpu.plan import Plan, Stream
from hope_kernels.delta_rule.pallas_tpu.products import product

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
    refs = dict(zip((*inputs, *outputs, "d_state"), given, strict=True))
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        refs["d_state"][...] = refs["d_end"][...].reshape(refs["d_state"].shape)

    columns = decay.load_columns(plan, refs)
    for streams in plan.groups(plan.gradient_group):
        _group(plan, refs, columns, streams)

    @pl.when(step == plan.tiles - 1)
    def _():
        refs["d_start"][...] = refs["d_state"][...].reshape(refs["d_start"].shape)


def _group(plan: Plan, refs: dict, columns: list[jax.Array], streams: list[Stream]) -> None:
    """One tile of a group of streams, (S5.5) with the roles of a key as row and as column of the system apart."""
    first, many, tile = streams[0].number, len(streams), plan.tile
    inside, outside = plan.gradient_passes, plan.passes
    shifted = plan.read == "before"
    gates = decay.load_gates(plan, refs, columns, streams)
    k = decay.load_heads(refs["k"], streams, plan.key_width, keys=True)
    w = decay.load_heads(refs["u"], streams, plan.value_width)
    start = jnp.stack([refs["starts"][s.row, 0, s.head] for s in streams])
    d_state = refs["d_state"][first : first + many]
    to_end, kept = decay.until_end(plan, gates), decay.whole_tile(plan, gates)
    k_end = decay.scaled(k, to_end)

    # The writes W once more, and their cotangent.
    d_w = product(k_end, d_state, "ck,kv", outside)
    kept_state = d_state if kept is None else kept * d_state
    # What an absent term leaves out stays None, and is not used.
    k_start: Any = None
    inverse: Any = None
    since_before = None
    if plan.erase:
        inverse = jnp.stack([refs["inverse"][s.row, 0, s.head] for s in streams])
        since_before = decay.since_start(plan, gates, shifted=True)
        k_start = decay.scaled(k, gates.eta, since_before)
        w = product(inverse, w - product(k_start, start, "tk,kv", outside), "ti,iv", inside)
    q: Any = None
    dy: Any = None
    since = None
    if plan.read:
        q = decay.load_heads(refs["q"], streams, plan.key_width, keys=True)
        dy = decay.load_heads(refs["dy"], streams, plan.value_width)
        since = decay.since_start(plan, gates, shifted)
        scores = decay.ratios_transposed(plan, gates, strict=shifted, shifted=shifted)
        d_w += product(scores * product(k, q, "ik,tk", inside), dy, "it,tv", inside)
    d_u = product(inverse, d_w, "ti,tv", inside) if plan.erase else d_w

    # The state: what the tile passes back, and the cotangents of what was multiplied with it.
    rows, cotangents = [], []  # of the system, and of the reads
    if plan.erase:
        rows.append(-k_start)
        cotangents.append(d_u)
    if plan.read:
        rows.append(decay.scaled(q, since))
        cotangents.append(dy.astype(jnp.float32))
    d_start = kept_state
    d_rows: Any = None
    products: Any = None
    products_T: Any = None
    if rows:
        both = jnp.concatenate(cotangents, axis=1)
        d_start += product(jnp.concatenate(rows, axis=1), both, "ck,cv", outside)
        d_rows = product(both, start, "tv,kv", outside)
        products = product(both, w, "tv,iv", inside)
        products_T = product(w, both, "iv,tv", inside)
    d_k_end = decay.scaled(product(w, d_state, "cv,kv", outside), to_end)
    refs["d_state"][first : first + many] = d_start

    # Keys and queries.
    d_k = d_k_end
    k32 = k.astype(jnp.float32)
    d_before = d_eta = d_total = None
    d_row: Any = None
    if plan.erase:
        system = -decay.ratios(plan, gates, strict=True, shifted=True) * products[:, :tile]
        system_T = -decay.ratios_transposed(plan, gates, strict=True, shifted=True) * products_T[:, :, :tile]
        d_row = product(system, k, "ti,ik", inside) - decay.scaled(d_rows[:, :tile], since_before)
        d_k += product(system_T * gates.eta_row, k, "it,tk", inside)
        d_eta = k32 * d_row
    if plan.read:
        score = decay.ratios(plan, gates, strict=shifted, shifted=shifted) * products[:, -tile:]
        score_T = decay.ratios_transposed(plan, gates, strict=shifted, shifted=shifted) * products_T[:, :, -tile:]
        d_q = product(score, k, "ti,ik", inside) + decay.scaled(d_rows[:, -tile:], since)
        d_k += product(score_T, q, "it,tk", inside)
        _store_keys(refs["dq"], streams, d_q)
        d_read = q.astype(jnp.float32) * d_q
        d_before, d_total = (d_read, None) if shifted else (None, d_read)
    d_total = -k32 * d_k if d_total is None else d_total - k32 * d_k
    if plan.erase:
        d_k += decay.scaled(d_row, gates.eta)
    _store_keys(refs["dk"], streams, d_k)
    for i, s in enumerate(streams):
        refs["du"][s.row, :, s.head * plan.value_width : (s.head + 1) * plan.value_width] = d_u[i].astype(k.dtype)

    # Gates: sums over the key width.
    at_end = jnp.sum(k32 * d_k_end, axis=1, keepdims=True).sum(axis=2, keepdims=True)
    at_end += jnp.sum(kept_state * start, axis=1, keepdims=True).sum(axis=2, keepdims=True)
    is_last = jax.lax.broadcasted_iota(jnp.int32, (1, 1, tile), 2) == tile - 1
    total = _row_sums(d_total, inside) + jnp.where(is_last, at_end, 0.0)
    eta = jnp.zeros_like(total) if d_eta is None else _row_sums(d_eta, inside)
    before = gates.eta_row * eta
    if d_before is not None:
        before += _row_sums(d_before, inside)
    for position, row in enumerate((total, before, eta)):
        for i, s in enumerate(streams):
            at = position * plan.cell_heads + s.head
            refs["d_gates"][s.row, 0, 0, at : at + 1, :] = row[i]


def _row_sums(x_GCK: jax.Array, passes: int) -> jax.Array:
    """[G, 1, C]: sums over the last axis as rows, by the matrix unit; the single pass is not enough for them."""
    ones = jnp.ones((x_GCK.shape[0], 8, x_GCK.shape[-1]), jnp.bfloat16)
    return product(ones, x_GCK, "ok,ck", max(passes, 3))[:, :1]


def _store_keys(ref, streams: list[Stream], values: jax.Array) -> None:
    """Store the gradients of key heads: the sums over the streams that share them."""
    width = values.shape[-1]
    for key in {(s.row, s.key_head) for s in streams}:
        shared = [values[i] for i, s in enumerate(streams) if (s.row, s.key_head) == key]
        row, head = key
        ref[row, :, head * width : (head + 1) * width] = sum(shared[1:], shared[0]).astype(ref.dtype)
