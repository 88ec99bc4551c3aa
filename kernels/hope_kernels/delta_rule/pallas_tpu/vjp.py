"""The two kernels as one differentiable function."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hope_kernels.delta_rule.batching import in_batch
from hope_kernels.delta_rule.pallas_tpu import backward_kernel, choose, forward_kernel, layout
from hope_kernels.delta_rule.pallas_tpu.plan import Plan
from hope_kernels.delta_rule.types import Inputs

type Result = tuple[jax.Array | None, jax.Array]  # y [B, T, H V], end [B, H, K, V]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def delta_rule(plan: Plan, inputs: Inputs, start_BHKV: jax.Array) -> Result:
    """Reads and final state. `inputs` with the heads side by side, [B, T, H K], and T a multiple of the tile."""
    return in_batch(partial(_run, plan, False))(inputs, start_BHKV)[:2]


def _forward(plan: Plan, inputs: Inputs, start_BHKV: jax.Array):
    y, end, kept = in_batch(partial(_run, plan, True))(inputs, start_BHKV)
    names = {"starts": "delta_rule_states", "inverse": "delta_rule_inverse"}
    kept = {name: checkpoint_name(x, names[name]) for name, x in kept.items()}
    return (y, end), (inputs, kept)


def _backward(plan: Plan, saved: tuple[Inputs, dict[str, jax.Array]], cotangents: Result):
    return in_batch(partial(_run_back, plan))(saved, cotangents)


delta_rule.defvjp(_forward, _backward)


def _run(plan: Plan, keep: bool, inputs: Inputs, start_BHKV: jax.Array):
    """Reads, final state, and with `keep` what the gradient needs besides the inputs."""
    plan = choose.for_batch(plan, start_BHKV.shape[0], inputs.k.dtype)
    out = forward_kernel.run(plan, {**_arrays(plan, inputs), "start": start_BHKV}, keep)
    return out.get("y"), out["end"], {name: out[name] for name in ("starts", "inverse") if name in out}


def _run_back(plan: Plan, saved: tuple[Inputs, dict[str, jax.Array]], cotangents: Result) -> tuple[Inputs, jax.Array]:
    inputs, kept = saved
    dy, d_end = cotangents
    plan = choose.for_batch(plan, d_end.shape[0], inputs.k.dtype)
    arrays = {**_arrays(plan, inputs), **kept}
    if dy is not None:
        arrays["dy"] = dy
    out = backward_kernel.run(plan, {**arrays, "d_end": d_end})
    d_log_alpha, d_eta = layout.unpack_gate_gradients(plan, out["d_gates"])
    d_inputs = Inputs(
        q=None if inputs.q is None else _join_parts(plan, out["dq"]),
        k=_join_parts(plan, out["dk"]),
        u=out["du"],
        eta=d_eta if plan.erase else None,
        log_alpha=d_log_alpha if plan.decay else None,
        log_mu=None,
        mask=None,
        reset=None if inputs.reset is None else jnp.zeros_like(inputs.reset),
    )
    return d_inputs, out["d_start"]


def _arrays(plan: Plan, inputs: Inputs) -> dict[str, jax.Array]:
    """The kernels' inputs by name."""
    arrays = {"k": inputs.k, "u": inputs.u, "gates": layout.pack_gates(plan, inputs.log_alpha, inputs.eta)}
    if inputs.q is not None:
        arrays = {"q": inputs.q, **arrays}
    if inputs.reset is not None:
        arrays["documents"] = layout.pack_documents(plan, inputs.reset)
    return arrays


def _join_parts(plan: Plan, gradient: jax.Array) -> jax.Array:
    """The gradient of the key heads from the parts that the cells they serve have left."""
    parts = plan.cells * plan.cell_key_heads // plan.key_heads
    if parts == 1:
        return gradient
    split = gradient.reshape(plan.batch, plan.tokens, plan.key_heads, parts, plan.key_width)
    return split.astype(jnp.float32).sum(axis=3).astype(gradient.dtype).reshape(plan.batch, plan.tokens, -1)
