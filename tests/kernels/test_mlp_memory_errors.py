"""Wrong calls say what was wrong."""

import jax.numpy as jnp
import pytest

from hope_kernels import mlp_memory
from hope_kernels.mlp_memory.arg_specs import ArgSpec, make_arguments

SPEC = ArgSpec(batch=2, tokens=3, heads=2, width=4, hidden=5, chunk_size=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": jnp.zeros((3, 2, 4))}, r"k must be .*\(3, 2, 4\)"),
        ({"w2": jnp.zeros((2, 2, 5, 4))}, r"w2 must be .*\(2, 3, 2, 4\); got \(2, 2, 5, 4\)"),
        ({"w1": jnp.zeros((2, 2, 4, 5))}, r"w1 must have shape \(2, 2, 5, 4\) .*got \(2, 2, 4, 5\)"),
        ({"q": jnp.zeros((2, 3, 2, 5))}, r"q must have shape \(2, 3, 2, 4\) .*\(2, 3, 2, 5\)"),
        ({"v": jnp.zeros((2, 3, 2, 5))}, r"v must have shape \(2, 3, 2, 4\) .*\(2, 3, 2, 5\)"),
        ({"eta": jnp.zeros((2, 3))}, r"eta must have shape \(2, 3, 2\).*\(2, 3\)"),
        ({"log_alpha": jnp.zeros((1, 3, 2))}, r"log_alpha must have shape .*\(1, 3, 2\)"),
        ({"log_mu": jnp.zeros((2, 3, 1))}, r"log_mu must have shape .*\(2, 3, 1\)"),
        ({"mask": jnp.zeros((2, 3), bool)}, r"mask must have shape .*\(2, 3\)"),
        ({"momentum1": jnp.zeros((2, 2, 4, 5))}, r"momentum1 must have shape \(2, 2, 5, 4\)"),
        ({"momentum2": jnp.zeros((2, 2, 5, 4))}, r"momentum2 must have shape \(2, 2, 4, 5\)"),
        ({"log_mu": None}, "without log_mu"),
        ({"log_mu": None, "momentum1": None}, "without log_mu"),
        ({"read": "now"}, "start, before, after; got 'now'"),
        ({"rule": "output"}, "input, layerwise; got 'output'"),
        ({"objective": "huber"}, "l2, dot_product; got 'huber'"),
        ({"error_clip": 0.0}, "above 0; got 0.0"),
        ({"chunk_size": 0}, "at least 1; got 0"),
        ({"group": 0}, "group is a number of chunks, at least 1; got 0"),
        ({"implementation": "pallas_gpu"}, "no implementation 'pallas_gpu'; there are: xla, reference"),
    ],
)
def test_values(changes, message):
    with pytest.raises(ValueError, match=message):
        mlp_memory(**{**make_arguments(SPEC), "chunk_size": 2, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": jnp.zeros((2, 3, 2, 4), jnp.int32)}, "k must be floating point; got int32"),
        ({"w2": jnp.zeros((2, 2, 4, 5), jnp.int32)}, "w2 must be floating point; got int32"),
        ({"mask": jnp.zeros((2, 3, 2))}, "mask must be bool.*float32"),
    ],
)
def test_types(changes, message):
    with pytest.raises(TypeError, match=message):
        mlp_memory(**{**make_arguments(SPEC), "chunk_size": 2, **changes})
