"""The chips' bounds: the table, the rooflines worked out by hand, and what is measured on a CPU."""

import jax
import pytest

from hope_kernels.chips import CHIPS, detect, measured, published
from hope_kernels.delta_rule.arg_specs import ARG_SPECS, ArgSpec
from hope_kernels.delta_rule.cost import cost, kernel_cost

# T so long that the states at both ends weigh nothing, and the three gates of kernels with a momentum left out.
LONG = ArgSpec(1, 2**30, 1, 128, 128, dtype="bfloat16")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_device_kinds(kind, name):
    assert published(kind) == (None if name is None else CHIPS[name])


@pytest.mark.parametrize(
    ("kernel", "tile", "flops", "size"),
    [
        # 6 K V = 98,304; 4 C (K + V) = 65,536 for C = 64; 2/3 C^2 = 2,730.7. q, k, u, y 4 x 256 bytes, 2 gates of 4.
        ("forward", 64, 166_570.67, 1032),
        ("forward", 128, 240_298.67, 1032),
        # and the inverse 2 C bytes, the states 4 K V / C
        ("forward_kept", 64, 166_570.67, 1032 + 128 + 1024),
        ("forward_kept", 128, 240_298.67, 1032 + 256 + 512),
        # 14 K V = 229,376; 10 C (K + V) = 163,840. 7 x 256 bytes, gates and their gradients 16
        ("gradients", 64, 393_216, 1808 + 128 + 1024),
        ("gradients", 128, 557_056, 1808 + 256 + 512),
    ],
)
def test_operations_and_bytes_of_a_token_head(kernel, tile, flops, size):
    found = kernel_cost(LONG, kernel, tile)
    assert found.flops / found.token_heads == pytest.approx(flops, rel=1e-6)
    assert found.bytes / found.token_heads == pytest.approx(size, rel=1e-6)


@pytest.mark.parametrize(
    ("chip", "kernel", "compute", "memory"),
    [
        ("v5e", "forward", 0.846, 1.259),  # 166,571 / 197e3; 1,032 / 820
        ("v6e", "forward_kept", 0.1815, 1.332),
        ("v6e", "gradients", 0.428, 1.805),
        ("tpu7x", "gradients", 0.341, 0.800),  # one of the two devices of a chip
        ("h100", "forward", 0.1684, 0.3081),
        ("h200", "gradients", 0.398, 0.617),
    ],
)
def test_bounds_in_nanoseconds_per_token_head(chip, kernel, compute, memory):
    found = kernel_cost(LONG, kernel, 64)
    seconds = CHIPS[chip].compute_seconds(found.flops, found.dtype), CHIPS[chip].memory_seconds(found.bytes)
    assert [(s or 0.0) / found.token_heads * 1e9 for s in seconds] == pytest.approx([compute, memory], rel=2e-3)


def test_a_call_of_one_tile():
    """B2 T16 H4 K=V=8 in float32: both ends of the state count, and a tile is no longer than the call."""
    spec = ArgSpec(2, 16, 4, 8, 8)
    found = cost(spec, "forward")
    assert (found.tokens, found.token_heads) == (32, 128)
    assert found.flops == pytest.approx(128 * (6 * 64 + 4 * 16 * 16 + 2 / 3 * 256))
    assert found.bytes == 128 * (4 * 4 * 8 + 2 * 4) + 8 * 2 * 4 * 64
    both = cost(spec, "forward+gradients")
    assert both.flops == pytest.approx(found.flops + 128 * (14 * 64 + 10 * 16 * 16))
    kept = 128 * 4 * 16 + 8 * 4 * 64
    assert both.bytes == found.bytes + 128 * (7 * 4 * 8 + 4 * 4) + 8 * 2 * 4 * 64 + 2 * kept


def test_absent_gates_momentum_and_shared_keys():
    def per_token_head(**changes):
        found = kernel_cost(LONG._replace(**changes), "forward", 64)
        return found.flops / found.token_heads, found.bytes / found.token_heads

    assert per_token_head(erase=False) == pytest.approx((4 * 2**14 + 4 * 64 * 128, 1028))
    flops, size = per_token_head(momentum=True)
    assert flops == pytest.approx(166_570.67 + 6 * 2**14 + 4 * 64 * 128 + 2 * 64**2, rel=1e-6)
    assert size == pytest.approx(1036, rel=1e-6)
    flops, size = per_token_head(heads=4, key_heads=1)  # q and k, and their products, once for four heads
    assert flops == pytest.approx(6 * 2**14 + 4 * 64 * (128 + 32) + 2 / 3 * 64**2)
    assert size == pytest.approx(512 + 128 + 8, rel=1e-6)


def test_every_shape_has_a_cost():
    for spec in ARG_SPECS.values():
        forward, both = cost(spec, "forward"), cost(spec, "forward+gradients")
        assert 0 < forward.flops < both.flops and 0 < forward.bytes < both.bytes


def test_a_cpu_is_measured():
    chip = detect()
    assert jax.devices()[0].platform == "cpu" and chip is not None
    assert chip.measured and chip.flops["float32"] > 1e9 and chip.bandwidth > 1e8
    assert chip.compute_seconds(1.0, "bfloat16") is None
    small = measured(["float32", "bfloat16"], width=8, megabytes=1, repeats=1)
    assert set(small.flops) == {"float32", "bfloat16"}
