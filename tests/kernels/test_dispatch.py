"""Choosing an implementation: the named one or an error, never another."""

import subprocess
import sys

import pytest

from hope_kernels.dispatch import Implementation, dispatch

DOUBLE = Implementation(lambda x: ("double", 2 * x))
SQUARE = Implementation(lambda x: ("square", x * x), lambda x: "needs a positive number" if x <= 0 else None)


def test_without_a_name_the_first_that_can_run():
    assert dispatch("op", {"square": SQUARE, "double": DOUBLE}, None, 3) == ("square", 9)
    assert dispatch("op", {"square": SQUARE, "double": DOUBLE}, None, -3) == ("double", -6)


def test_a_named_one_runs():
    assert dispatch("op", {"square": SQUARE, "double": DOUBLE}, "double", 3) == ("double", 6)


def test_a_named_one_that_cannot_run_raises_with_the_reason_and_the_names():
    with pytest.raises(NotImplementedError, match=r"'square' cannot run: needs a positive.*square, double"):
        dispatch("op", {"square": SQUARE, "double": DOUBLE}, "square", -3)


def test_an_unknown_name_lists_those_that_exist():
    with pytest.raises(ValueError, match="op has no implementation 'cube'; there are: square, double"):
        dispatch("op", {"square": SQUARE, "double": DOUBLE}, "cube", 3)


def test_none_that_can_run_gives_every_reason():
    with pytest.raises(NotImplementedError, match="'square' cannot run: needs a positive"):
        dispatch("op", {"square": SQUARE}, None, -3)


def test_hope_kernels_depends_on_jax_alone():
    program = (
        "import sys, hope_kernels, hope_kernels.testing, hope_kernels.benchmarking;"
        "print([m for m in ('hope_jax', 'flax', 'optax', 'orbax', 'rich') if m in sys.modules])"
    )
    environment = {"PYTHONPATH": ":".join(p for p in sys.path if p), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert result.stdout.strip() == "[]"
