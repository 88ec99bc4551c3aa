"""From a call to its plan: what the kernels cannot do, and the sizes of a cell."""

from dataclasses import replace

import jax.numpy as jnp

from hope_kernels.delta_rule.config import Config, tpu_sizes
from hope_kernels.delta_rule.pallas_tpu import layout
from hope_kernels.delta_rule.pallas_tpu.inverse import BASE
from hope_kernels.delta_rule.pallas_tpu.plan import Plan
from hope_kernels.delta_rule.types import Inputs
from hope_kernels.dispatch import target_device

KEY_WIDTHS = (64, 128, 256)
VALUE_MULTIPLE = 64
FEWEST_TOKENS = 64


def cannot_run(inputs: Inputs, config: Config) -> str | None:
    """Why the kernels do not do this call, as one phrase."""
    k, u = inputs.k, inputs.u
    if inputs.log_mu is not None:
        return "it has no momentum (log_mu); use implementation='xla'"
    if k.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 or float32 inputs, not {k.dtype}; use implementation='xla'"
    if k.shape[3] not in KEY_WIDTHS:
        return f"its key widths are {KEY_WIDTHS}, not {k.shape[3]}; pad the keys with zeros or use implementation='xla'"
    if u.shape[3] % VALUE_MULTIPLE or not u.shape[3]:
        return f"value widths are multiples of {VALUE_MULTIPLE}, not {u.shape[3]}; pad u or use implementation='xla'"
    if config.block_t is not None and not _is_tile(config.block_t):
        return f"tiles have 16, 32, 64, 128 or 256 tokens, not block_t={config.block_t}"
    if config.interpret is None and target_device().platform != "tpu":
        return f"it needs a TPU, and this is {target_device().platform} (Config(interpret=True) simulates one)"
    if _plan(inputs, None, config, "default") is None:
        return f"{u.shape[2]} heads of {k.shape[3]} by {u.shape[3]} do not fit its memory; use implementation='xla'"
    return None


def unsuited(inputs: Inputs) -> str | None:
    """Why another implementation is the better choice."""
    tokens = inputs.k.shape[1]
    if tokens < FEWEST_TOKENS:
        return f"its tile would mostly be padding with fewer than {FEWEST_TOKENS} tokens; there are {tokens}"
    return None


def plan_call(inputs: Inputs, read: str, config: Config, precision: str) -> Plan:
    """The plan of a call that can run."""
    plan = _plan(inputs, read, config, precision)
    if plan is None:
        raise NotImplementedError(cannot_run(inputs, config))
    return plan


def _is_tile(tokens: int) -> bool:
    return tokens in [BASE << i for i in range(5)]


def for_batch(plan: Plan, batch: int, dtype: jnp.dtype) -> Plan:
    """The plan of the same call for another number of batch entries; what fitted one fits any."""
    found = _cut(replace(plan, batch=batch), dtype)
    assert found is not None
    return found


def _plan(inputs: Inputs, read: str | None, config: Config, precision: str) -> Plan | None:
    batch, tokens, key_heads, key_width = inputs.k.shape
    wide = inputs.k.dtype == jnp.float32
    sizes = tpu_sizes(target_device().device_kind, tokens, config)
    plan = Plan(
        batch=batch,
        tokens=-(-tokens // sizes.block_t) * sizes.block_t,
        key_heads=key_heads,
        heads=inputs.u.shape[2],
        key_width=key_width,
        value_width=inputs.u.shape[3],
        sizes=sizes,
        rows=1,
        cell_heads=1,
        group=1,
        gradient_group=1,
        read=None if inputs.q is None else read,
        erase=inputs.eta is not None,
        decay=inputs.log_alpha is not None,
        resets=inputs.reset is not None,
        inverse_passes=6 if wide else 3 if precision == "high" else 1,
        passes=6 if wide else 1,
        gradient_passes=6 if wide else 1 if precision == "fast" else 3,
        interpret=config.interpret,
    )
    return _cut(plan, inputs.k.dtype)


def _cut(plan: Plan, dtype: jnp.dtype) -> Plan | None:
    """The plan with the largest cell that has at most as many streams as its sizes say and fits the memory."""
    sizes, family = plan.sizes, plan.heads // plan.key_heads
    widths = max((plan.key_width + plan.value_width) // 256, 1)  # the sizes are for 128 by 128; wider, smaller groups
    for cell_heads, rows in _cells(plan):
        shared = min(family, cell_heads)  # heads of one key head are computed together, their gradients are summed
        cut = replace(
            plan,
            rows=rows,
            cell_heads=cell_heads,
            group=max(sizes.group // widths // shared, 1) * shared,
            gradient_group=max(sizes.gradient_group // widths // shared, 1) * shared,
        )
        if layout.vmem_bytes(cut, dtype) <= layout.VMEM_BYTES:
            return cut
    return None


def _cells(plan: Plan) -> list[tuple[int, int]]:
    """(heads, batch entries) a cell can have, the most streams that the sizes allow first, then ever fewer."""
    heads, key_heads, batch = plan.heads, plan.key_heads, plan.batch
    family = heads // key_heads
    found = []
    for cell_heads in (n for n in range(1, heads + 1) if heads % n == 0):
        whole_families = cell_heads % family == 0 or family % cell_heads == 0
        keys = max(cell_heads // family, 1)
        aligned = layout.is_lane_aligned(keys * plan.key_width, key_heads * plan.key_width) and layout.is_lane_aligned(
            cell_heads * plan.value_width, heads * plan.value_width
        )
        # A key head that serves several cells leaves its gradient in parts, an array of another width.
        aligned = aligned and layout.is_lane_aligned(keys * plan.key_width, heads // cell_heads * keys * plan.key_width)
        if whole_families and aligned:
            found += [(cell_heads, rows) for rows in range(1, batch + 1) if batch % rows == 0]
    fit = [c for c in found if c[0] * c[1] <= plan.sizes.heads]
    fewest = min(c[0] for c in found)  # the whole of H always qualifies
    return sorted(fit, key=lambda c: (c[0] * c[1], c[0]), reverse=True) or [(fewest, 1)]
