"""What a chip can do at best: the bounds that a measured time is compared with.

A call that needs F operations and moves B bytes takes at least F / flops and B / bandwidth seconds. For accelerators
the figures are the published peaks of one device as jax counts devices; for a CPU, where nobody publishes them, they
are measured in this process: a large matrix product, and adding one to an array larger than the caches.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Chip(NamedTuple):
    """Peak rates of one device."""

    name: str
    flops: dict[str, float]  # operations per second by input dtype, full precision of that dtype
    bandwidth: float  # bytes per second to and from the main memory
    measured: bool = False  # in this process, rather than published
    memory: float | None = None  # bytes of main memory that a program may use, as the compiler's messages give it

    def compute_seconds(self, flops: float, dtype: str) -> float | None:
        """The least time for `flops` operations; None where the peak is not known."""
        return flops / self.flops[dtype] if dtype in self.flops else None

    def memory_seconds(self, size: float) -> float:
        """The least time to move `size` bytes."""
        return size / self.bandwidth


def _tpu(name: str, bfloat16: float, bandwidth: float, memory: float) -> Chip:
    """Rates in TFLOP/s and TB/s, memory in GiB; a float32 product at full precision takes six bfloat16 passes."""
    rates = {"bfloat16": bfloat16 * 1e12, "float32": bfloat16 * 1e12 / 6}
    return Chip(name, rates, bandwidth * 1e12, memory=memory * 2**30)


def _gpu(name: str, bfloat16: float, float32: float, bandwidth: float) -> Chip:
    """Rates in TFLOP/s and TB/s: dense tensor cores, and float32 outside them."""
    return Chip(name, {"bfloat16": bfloat16 * 1e12, "float32": float32 * 1e12}, bandwidth * 1e12)


CHIPS = {
    "v5e": _tpu("TPU v5e", 197, 0.82, 15.75),
    "v5p": _tpu("TPU v5p", 459, 2.46, 95.74),
    "v6e": _tpu("TPU v6e", 918, 1.64, 31.25),
    "tpu7x": _tpu("TPU7x, one of the two devices of a chip", 2307 / 2, 7.4 / 2, 94.75),
    "a100": _gpu("A100 80GB SXM", 312, 19.5, 2.04),
    "h100-pcie": _gpu("H100 PCIe", 756, 51, 2.04),
    "h100": _gpu("H100 SXM", 989, 67, 3.35),
    "h200": _gpu("H200 SXM", 989, 67, 4.8),
    "b200": _gpu("B200", 2250, 80, 8.0),
}

# Words of jax's `device_kind`, the most particular first.
_KINDS = (
    ("v5 lite", "v5e"),
    ("v5e", "v5e"),
    ("v5", "v5p"),
    ("v6", "v6e"),
    ("TPU7x", "tpu7x"),
    ("A100", "a100"),
    ("H100 PCIe", "h100-pcie"),
    ("H100", "h100"),
    ("H200", "h200"),
    ("B200", "b200"),
)


def published(device_kind: str) -> Chip | None:
    """The chip that jax calls `device_kind`, or None if it is not in the table.

    Example:
        >>> published("TPU v6 lite").name
        'TPU v6e'
    """
    return next((CHIPS[name] for word, name in _KINDS if word in device_kind), None)


def detect(dtypes: Sequence[str] = ("float32",)) -> Chip | None:
    """The chip of the first device: from the table, on a CPU measured for these dtypes, None if unknown."""
    device = jax.devices()[0]
    return measured(dtypes) if device.platform == "cpu" else published(device.device_kind)


def measured(dtypes: Sequence[str], width: int = 1024, megabytes: int = 64, repeats: int = 7) -> Chip:
    """This machine's rates: the fastest of `repeats` products of `width` squared and passes over `megabytes`."""
    flops = {}
    for dtype in dtypes:
        x = jnp.asarray(np.random.default_rng(0).normal(size=(width, width)), dtype)
        flops[dtype] = 2 * width**3 / _fastest(jax.jit(lambda x: x @ x), x, repeats)
    x = jnp.ones(megabytes * 2**20 // 4, jnp.float32)
    bandwidth = 2 * x.nbytes / _fastest(jax.jit(lambda x: x + 1), x, repeats)
    return Chip(f"this {jax.devices()[0].platform}", flops, bandwidth, measured=True)


def _fastest(function: Callable[..., Any], x: jax.Array, repeats: int) -> float:
    jax.block_until_ready(function(x))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(x))
        seconds.append(time.perf_counter() - start)
    return min(seconds)
