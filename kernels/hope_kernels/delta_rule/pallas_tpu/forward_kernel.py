"""The forward kernel: the grid walks over the tiles of a cell, the states stay in VMEM."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from hope_kernels.delta_rule.pallas_tpu import decay, layout
from hope_kernels.delta_rule.pallas_tpu.inverse import unit_lower_inverse
from hope_kernels.delta_rule.pallas_tpu.plan import Plan, Stream
from hope_kernels.delta_rule.pallas_tpu.products import product

NAME = "delta_rule_forward"


def run(plan: Plan, arrays: dict[str, jax.Array], keep: bool) -> dict[str, jax.Array]:
    """One pass over all tiles.

    Args:
        plan: the static side of the call.
        arrays: "q" (if there are reads), "k", "u", "gates", "documents" (if there are resets), "start".
        keep: also return what the backward pass needs.

    Returns:
        "y" (if there are reads), "end", and with `keep` "starts" and "inverse" (if there is an erasure).
    """
    dtype = arrays["k"].dtype
    kept = {"starts": jnp.float32, **({"inverse": plan.inverse_dtype} if plan.erase else {})} if keep else {}
    out = {**({"y": dtype} if plan.read else {}), "end": jnp.float32, **kept}
    return layout.launch(plan, _kernel, NAME, arrays, out, backwards=False)


def _kernel(plan: Plan, inputs: tuple[str, ...], outputs: tuple[str, ...], *given) -> None:
    refs = dict(zip((*inputs, *outputs, "shifted"), given, strict=True))
    tile = pl.program_id(2)

    @pl.when(tile == 0)
    def _():
        refs["end"][...] = refs["start"][...]

    columns = decay.load_columns(plan, refs)
    for streams in plan.groups(plan.group):
        _group(plan, refs, columns, streams)


def _group(plan: Plan, refs: dict, columns: list[jax.Array], streams: list[Stream]) -> None:
    """One tile of a group of streams, (S5.2) and (S5.3)."""
    tile = plan.tile
    gates = decay.load_gates(plan, refs, columns, streams)
    k = decay.load_heads(refs["k"], streams, plan.key_width, keys=True)
    q = decay.load_heads(refs["q"], streams, plan.key_width, keys=True) if plan.read else None
    w = decay.load_heads(refs["u"], streams, plan.value_width)
    state = jnp.stack([refs["end"][s.row, s.head] for s in streams])
    _keep(refs, "starts", streams, state)

    now, before = decay.since_and_ratios(plan, refs["shifted"], gates, streams)
    at_read = before if plan.read == "before" else now
    asked = [] if q is None else [q]  # what the keys are multiplied with: themselves and the queries
    reads = [] if q is None else [decay.scaled(q, at_read.since).astype(q.dtype)]
    if plan.erase:
        asked.insert(0, k)
        reads.insert(0, decay.scaled(k, gates.eta, before.since).astype(k.dtype))
    products: Any = product(jnp.concatenate(asked, axis=1), k, "tk,ik", plan.passes) if asked else None
    recalled: Any = product(jnp.concatenate(reads, axis=1), state, "tk,kv", plan.passes) if reads else None
    if plan.erase:
        inverse = unit_lower_inverse(gates.eta[:, :, :tile] * before.ratio * products[:, :tile], plan.inverse_passes)
        _keep(refs, "inverse", streams, inverse)
        w = product(inverse, w - recalled[:, :tile], "ti,iv", max(plan.passes, plan.inverse_passes))
    w = w.astype(k.dtype)
    if q is not None:
        scores = at_read.ratio * products[:, -tile:]
        y = recalled[:, -tile:] + product(scores, w, "ti,iv", plan.passes)
        for i, s in enumerate(streams):
            width = plan.value_width
            refs["y"][s.row, :, s.head * width : (s.head + 1) * width] = y[i].astype(k.dtype)

    written = product(decay.scaled(k, decay.until_end(plan, gates)).astype(k.dtype), w, "ck,cv", plan.passes)
    kept = decay.whole_tile(plan, gates)
    state = (state if kept is None else kept * state) + written
    for i, s in enumerate(streams):
        refs["end"][s.row, s.head] = state[i]


def _keep(refs: dict, name: str, streams: list[Stream], values: jax.Array) -> None:
    """Write one of the arrays for the backward pass, if it is wanted."""
    if name in refs:
        for i, s in enumerate(streams):
            refs[name][s.row, 0, s.head] = values[i].astype(refs[name].dtype)
