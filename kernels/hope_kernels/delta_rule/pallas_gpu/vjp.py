"""The four kernels as one differentiable function."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hope_kernels.delta_rule.batching import in_batch
from hope_kernels.delta_rule.pallas_gpu.gates import gate_gradients, gate_rows
from hope_kernels.delta_rule.pallas_gpu.gradients import gradients
from hope_kernels.delta_rule.pallas_gpu.inverse import tile_products
from hope_kernels.delta_rule.pallas_gpu.plan import Plan
from hope_kernels.delta_rule.pallas_gpu.reverse import reverse_scan
from hope_kernels.delta_rule.pallas_gpu.scan import scan
from hope_kernels.delta_rule.types import Inputs

type Result = tuple[jax.Array | None, jax.Array]  # y [B, T, H, V], end [B, H, K, V]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def delta_rule(plan: Plan, inputs: Inputs, start_BHKV: jax.Array) -> Result:
    """Reads and final state; T a multiple of the tile."""
    return in_batch(partial(_run, plan, False))(inputs, start_BHKV)[:2]


def _forward(plan: Plan, inputs: Inputs, start_BHKV: jax.Array):
    y, end, *kept = in_batch(partial(_run, plan, True))(inputs, start_BHKV)
    names = ("delta_rule_states", "delta_rule_states", "delta_rule_inverse", "delta_rule_inverse")
    kept = [None if x is None else checkpoint_name(x, name) for x, name in zip(kept, names, strict=True)]
    return (y, end), (inputs, *kept)


def _backward(plan: Plan, saved: tuple[Any, ...], cotangents: Result):
    return in_batch(partial(_run_back, plan))(saved, cotangents)


delta_rule.defvjp(_forward, _backward)


def _rows(plan: Plan, inputs: Inputs) -> jax.Array:
    return gate_rows(inputs.eta, inputs.log_alpha, inputs.reset, inputs.u.shape[:3], before=plan.before)


def _run(plan: Plan, residuals: bool, inputs: Inputs, start_BHKV: jax.Array) -> tuple[jax.Array | None, ...]:
    """Reads, final state, and with `residuals` what the gradient needs besides the inputs."""
    rows = _rows(plan, inputs)
    inverse, scores = None, None
    if plan.erase or inputs.q is not None:
        inverse, scores = tile_products(
            inputs.q,
            inputs.k,
            rows,
            heads=plan.heads,
            erase=plan.erase,
            decay=plan.decay,
            reset=plan.reset,
            before=plan.before,
            parts=plan.parts,
            interpret=plan.interpret,
        )
    y, end, starts, w = scan(
        inputs.q,
        inputs.k,
        inputs.u,
        inverse,
        scores,
        rows,
        start_BHKV,
        decay=plan.scaled,
        residuals=residuals,
        columns=plan.columns,
        interpret=plan.interpret,
    )
    return (y, end, starts, w, inverse, scores) if residuals else (y, end)


def _run_back(plan: Plan, saved: tuple[Any, ...], cotangents: Result) -> tuple[Inputs, jax.Array]:
    inputs, starts, w, inverse, scores = saved
    dy, d_end = cotangents
    rows = _rows(plan, inputs)
    du, d_ends, d_start = reverse_scan(
        inputs.q,
        inputs.k,
        dy,
        inverse,
        scores,
        rows,
        d_end,
        decay=plan.scaled,
        columns=plan.columns,
        interpret=plan.interpret,
    )
    dq, dk, sums = gradients(
        inputs.q,
        inputs.k,
        inputs.u if w is None else w,
        du,
        dy,
        starts,
        d_ends,
        rows,
        erase=plan.erase,
        decay=plan.scaled,
        reset=plan.reset,
        before=plan.before,
        parts=plan.square_parts,
        interpret=plan.interpret,
    )
    d_eta, d_log_alpha = gate_gradients(rows, sums, before=plan.before)
    d_inputs = Inputs(
        q=None if dq is None else _of_key_heads(dq, inputs.k),
        k=_of_key_heads(dk, inputs.k),
        u=du,
        eta=d_eta if plan.erase else None,
        log_alpha=d_log_alpha if plan.decay else None,
        log_mu=None,
        mask=None,
        reset=None if inputs.reset is None else jnp.zeros_like(inputs.reset),
    )
    return d_inputs, d_start


def _of_key_heads(gradient_BTHK: jax.Array, k: jax.Array) -> jax.Array:
    """The sum over the value heads that share a key head."""
    if gradient_BTHK.shape == k.shape:
        return gradient_BTHK
    batch, tokens, key_heads, width = k.shape
    split = gradient_BTHK.reshape(batch, tokens, key_heads, -1, width)
    return split.astype(jnp.float32).sum(3).astype(k.dtype)
