"""The GPU kernels compile for a Hopper GPU: nothing spilled, and the tensor cores do the products. Needs no GPU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from hope_kernels import Config, aot_gpu, delta_rule

pytestmark = [
    pytest.mark.aot_gpu,
    pytest.mark.skipif(not aot_gpu.available(), reason="needs jax's CUDA plugin: pip install 'jax[cuda13]'"),
]
GATES = ("eta", "log_alpha")
KERNELS = {f"delta_rule_{name}" for name in ("products", "scan", "reverse", "gradients")}


def call(options, arguments, segment_ids, cotangents):
    """Forward and backward."""
    how = {"implementation": "pallas_gpu"} | options | {"config": Config(**options.get("config", {}))}

    def run(arguments):
        out: Any = delta_rule(**arguments, segment_ids=segment_ids, **how)
        return out.y, out.state

    out, pullback = jax.vjp(run, arguments)
    return out, pullback(cotangents)


def case(options, *sizes):
    """What is compiled, and for what shapes."""
    return partial(call, options), shapes(*sizes)


def shapes(batch, heads, key_width, value_width, gates, resets):
    x: Any = jax.ShapeDtypeStruct
    tokens, key_heads = 256, heads // 2
    k, u = x((batch, tokens, key_heads, key_width), jnp.bfloat16), x((batch, tokens, heads, value_width), jnp.bfloat16)
    gate, state = x((batch, tokens, heads), jnp.float32), x((batch, heads, key_width, value_width), jnp.float32)
    arguments = {"q": k, "k": k, "u": u, "initial_state": state} | {name: gate for name in gates}
    return arguments, x((batch, tokens), jnp.int32) if resets else None, (u, state)


@pytest.mark.parametrize(
    ("heads", "key_width", "value_width"),
    [(2, 64, 64), (2, 128, 128), (256, 128, 128), (2, 256, 256), (256, 64, 256), (2, 64, 320)],
)
def test_nothing_is_spilled(heads, key_width, value_width):
    """Few heads: one warpgroup per block of the scans, many: two."""
    check(aot_gpu.report(case, {}, 1, heads, key_width, value_width, GATES, True))


@pytest.mark.parametrize(("heads", "key_width"), [(2, 64), (2, 128), (256, 128)])
def test_high_precision(heads, key_width):
    check(aot_gpu.report(case, {"precision": "high"}, 1, heads, key_width, key_width, GATES, True))


def test_segments():
    check(aot_gpu.report(case, {"config": {"segments": 2}}, 1, 2, 128, 64, GATES, True))


@pytest.mark.parametrize("gates", [(), ("eta",), ("log_alpha",)])
def test_absent_gates(gates):
    check(aot_gpu.report(case, {"read": "before"}, 1, 2, 128, 128, gates, False))


def check(found):
    assert set(found) == KERNELS
    for name, figures in found.items():
        assert figures.spilled_bytes == 0 and figures.stack_bytes == 0, (name, figures)
        assert figures.registers <= 255 and figures.wgmma > 0, (name, figures)
