"""Wrong calls say what was wrong."""

import jax.numpy as jnp
import pytest

from hope_kernels import Config, delta_rule
from hope_kernels.delta_rule.arg_specs import ArgSpec, make_arguments

SPEC = ArgSpec(batch=2, tokens=3, heads=2, key_width=4, value_width=5)
GATE, STATE = (2, 3, 2), (2, 2, 4, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": jnp.zeros((3, 2, 4))}, r"k must be .*\(3, 2, 4\)"),
        ({"u": jnp.zeros((2, 4, 2, 5))}, r"u must be .*\(2, 4, 2, 5\)"),
        ({"q": jnp.zeros((2, 3, 2, 5))}, r"q must have shape \(2, 3, 2, 4\) .*\(2, 3, 2, 5\)"),
        ({"eta": jnp.zeros((2, 3))}, r"eta must have shape \(2, 3, 2\).*\(2, 3\)"),
        ({"log_alpha": jnp.zeros((1, 3, 2))}, r"log_alpha must have shape .*\(1, 3, 2\)"),
        ({"log_mu": jnp.zeros((2, 3, 1))}, r"log_mu must have shape .*\(2, 3, 1\)"),
        ({"mask": jnp.zeros((2, 3), bool)}, r"mask must have shape .*\(2, 3\)"),
        ({"initial_state": jnp.zeros((2, 2, 5, 4))}, r"initial_state must have shape \(2, 2, 4, 5\)"),
        (
            {"log_mu": jnp.zeros(GATE), "initial_momentum": jnp.zeros((2, 2, 5, 4))},
            r"initial_momentum must have shape \(2, 2, 4, 5\)",
        ),
        ({"initial_momentum": jnp.zeros(STATE)}, "without log_mu"),
        ({"read": "now"}, "start, before, after; got 'now'"),
        ({"precision": "low"}, "default, high, fast; got 'low'"),
        ({"implementation": "cuda"}, "no implementation 'cuda'; there are: .*xla, reference"),
        ({"segment_ids": jnp.zeros((3, 2), int)}, r"segment_ids must have shape \(2, 3\)"),
        ({"k": jnp.zeros((2, 3, 3, 4))}, "heads of k must divide those of u; got 3 and 2"),
    ],
)
def test_values(changes, message):
    with pytest.raises(ValueError, match=message):
        delta_rule(**{**make_arguments(SPEC), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": jnp.zeros((2, 3, 2, 4), jnp.int32)}, "k must be floating point; got int32"),
        ({"eta": jnp.zeros(GATE, jnp.int32)}, "eta must be floating point; got int32"),
        ({"mask": jnp.zeros(GATE)}, "mask must be bool.*float32"),
        ({"segment_ids": jnp.zeros((2, 3))}, "segment_ids must be integers; got float32"),
    ],
)
def test_types(changes, message):
    with pytest.raises(TypeError, match=message):
        delta_rule(**{**make_arguments(SPEC), **changes})


@pytest.mark.parametrize("field", ["block_t", "heads", "group"])
def test_sizes_of_a_config(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1; got 0"):
        Config(**{field: 0})  # pyright: ignore[reportArgumentType]
