"""How much of what the devices can do a run makes use of: MFU, the model FLOPs utilisation.

It is the matrix products that the forward and the backward pass of the model need, without recomputation and without
the optimizer, per second, over the published peak of the devices in bfloat16 (as in PaLM, arXiv:2204.02311).
Elementwise work, which no matrix unit does, does not raise it, and neither does a kernel that takes more products than
the XLA form of its operation: the model is counted in that form, on every machine.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hope_jax.models import build_lm
from hope_jax.training.config import TrainConfig
from hope_jax.training.flops import Flops, flops_of
from hope_jax.training.step import token_losses
from hope_kernels.chips import published


def model_flops(config: TrainConfig) -> Flops:
    """Operations that a step's forward and backward pass need, over all devices; `remat` makes no difference.

    What the hardware does, with its kernels, recomputation and optimizer, is
    `flops_of(program.train_step, state, tokens)`.

    Raises:
      ValueError: see `flops_of`.
    """
    lm = build_lm(dataclasses.replace(config.model, remat="none"))
    params = jax.eval_shape(lm.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((config.microbatch, config.seq_len + 1), jnp.uint8)
    gradient = jax.grad(lambda params, tokens: token_losses(lm, params, tokens).mean())
    with jax.default_device(_without_kernels()):
        return Flops().plus(flops_of(gradient, params, tokens), config.accumulate)


def _without_kernels() -> Any:
    """A device that no kernel is written for; None, jax's choice, if this process is kept from using its CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def peak_flops(config: TrainConfig, devices: Sequence[Any]) -> float | None:
    """FLOP/s of all devices together: `peak_flops` of the config for each, else as published, None if unknown."""
    if config.peak_flops:
        return config.peak_flops * len(devices)
    chip = published(devices[0].device_kind)
    return None if chip is None else chip.flops["bfloat16"] * len(devices)


def seconds_at_peak(config: TrainConfig, devices: Sequence[Any]) -> float | None:
    """The least time of a step; over the time that it takes, it is the MFU. None where the peak or the count is not."""
    peak = peak_flops(config, devices)
    if peak is None:
        return None
    try:
        return model_flops(config).products / peak
    except ValueError:  # a loop that only the data end
        return None
