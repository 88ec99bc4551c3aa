"""The XLA form against the token loop in float64, in the cases that break chunked forms."""

from typing import Any

import pytest

from hope_kernels import Config
from hope_kernels.delta_rule.arg_specs import ArgSpec
from tests.kernels.cases import (
    BOUNDS,
    CASES,
    arguments_of,
    check_against_oracle,
    gate_cosine,
    zero_cotangent_gradients,
)

SPEC = ArgSpec(batch=1, tokens=77, heads=2, key_width=32, value_width=16)
HOW: dict[str, Any] = {"implementation": "xla", "config": Config(block_t=32)}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_hard_cases(dtype, case):
    check_against_oracle(arguments_of(case, SPEC._replace(dtype=dtype)), **HOW)


def test_zero_cotangents_give_zero_gradients():
    gradients = zero_cotangent_gradients(arguments_of("random", SPEC), **HOW)
    assert len(gradients) == 6 and max(gradients.values()) == 0


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_gradients_of_gate_parameters_point_the_right_way(dtype):
    assert gate_cosine(arguments_of("random", SPEC._replace(dtype=dtype)), **HOW) >= 0.999
