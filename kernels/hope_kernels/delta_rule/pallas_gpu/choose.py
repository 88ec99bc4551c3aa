"""From a call to its plan: what the kernels cannot do, and how the columns of V are divided."""

import importlib.util
from typing import Any

import jax.numpy as jnp

from hope_kernels.delta_rule.config import Config
from hope_kernels.delta_rule.pallas_gpu.plan import Plan
from hope_kernels.delta_rule.types import Inputs
from hope_kernels.dispatch import target_device

TILE = 64
COLUMNS = 64  # of V that a warpgroup works on
KEY_WIDTHS = (64, 128, 256)
PROCESSORS = 132  # of an H100 or H200
SEGMENT = 8  # tiles in the shortest segment: a launch costs about as much as a few tiles


def cannot_run(inputs: Inputs, config: Config, precision: str) -> str | None:
    """Why the kernels do not do this call, as one phrase."""
    k, u = inputs.k, inputs.u
    if inputs.log_mu is not None:
        return "it has no momentum (log_mu); use implementation='xla'"
    if k.dtype != jnp.bfloat16:
        return f"it takes bfloat16 inputs, not {k.dtype}, its products would be too coarse; use implementation='xla'"
    if k.shape[3] not in KEY_WIDTHS:
        return f"its key widths are {KEY_WIDTHS}, not {k.shape[3]}; use implementation='xla'"
    if k.shape[3] == 256 and precision == "high":
        return "its memory has no room for precision='high' with keys of width 256; use implementation='xla'"
    if not u.shape[3] or u.shape[3] % COLUMNS:
        return f"its value widths are multiples of {COLUMNS}, not {u.shape[3]}; use implementation='xla'"
    if config.block_t not in (None, TILE):
        return f"its tiles have {TILE} tokens, not block_t={config.block_t}"
    if importlib.util.find_spec("absl") is None:
        return "jax's Mosaic GPU needs the package absl-py"
    if config.interpret is None:
        return _wrong_machine(target_device())
    return None


def plan_call(inputs: Inputs, read: str, config: Config, precision: str) -> Plan:
    """The plan of a call that can run."""
    batch, _, heads, value_width = inputs.u.shape
    wide = inputs.k.shape[3] <= 128 and value_width % 128 == 0 and batch * heads * value_width // 128 >= PROCESSORS
    return Plan(
        heads=heads,
        before=read == "before",
        erase=inputs.eta is not None,
        decay=inputs.log_alpha is not None,
        reset=inputs.reset is not None,
        parts=2 if precision == "high" else 1,
        square_parts=1 if precision == "fast" else 2,
        columns=128 if wide else 64,
        interpret=_simulator() if config.interpret is True else config.interpret,
    )


def segments(inputs: Inputs) -> int:
    """As many as fill the processors, but only where at most half of the steps then follow one another.

    The first run over the segments has K more columns, so cutting into N makes 2 + K / V walks of a length of 1 / N.
    """
    batch, tokens, heads, value_width = inputs.u.shape
    blocks = max(batch * heads * value_width // COLUMNS, 1)
    found = min(PROCESSORS // blocks, tokens // (TILE * SEGMENT))
    return found if found >= 2 * (2 + inputs.k.shape[3] / value_width) else 1


def _wrong_machine(device: Any) -> str | None:
    if device.platform not in ("gpu", "cuda"):
        return f"it needs an NVIDIA GPU, and this is {device.platform} (Config(interpret=True) simulates one)"
    capability = str(getattr(device, "compute_capability", "unknown"))
    if not capability.startswith("9."):
        return f"it is written for compute capability 9 (H100, H200), and this is {capability}"
    return None


def _simulator() -> Any:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams()
