"""Choosing an implementation: the named one or an error, never another."""

import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from hope_kernels.dispatch import Implementation, dispatch, explain, target_device

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


def test_an_unsuited_one_is_passed_over_but_runs_when_named():
    slow = Implementation(lambda x: ("slow", x + x), unsuited=lambda x: "slow for small numbers" if x < 5 else None)
    assert dispatch("op", {"slow": slow, "double": DOUBLE}, None, 3) == ("double", 6)
    assert dispatch("op", {"slow": slow, "double": DOUBLE}, None, 7) == ("slow", 14)
    assert dispatch("op", {"slow": slow, "double": DOUBLE}, "slow", 3) == ("slow", 6)


def test_explain_collects_the_choices_of_a_whole_function():
    implementations = {"square": SQUARE, "double": DOUBLE}

    def function(x, *, negative):
        dispatch("op", implementations, None, 3)
        return x + dispatch("op", implementations, None, -3 if negative else 3)[1]

    lines = explain(function, jnp.ones(2), negative=True).splitlines()
    assert lines == ["op: 'square' runs", "op: 'double' runs; 'square' cannot run: needs a positive number"]
    assert explain(function, jax.ShapeDtypeStruct((2,), jnp.float32), negative=False) == "\n".join([lines[0]] * 2)
    assert explain(jnp.sin, jnp.ones(2)) == ""


def test_choices_are_logged_at_debug_level(caplog):
    with caplog.at_level(logging.DEBUG, logger="hope_kernels"):
        dispatch("op", {"square": SQUARE, "double": DOUBLE}, None, -3)
    assert [r.message for r in caplog.records] == ["op: 'double' runs; 'square' cannot run: needs a positive number"]


def test_the_target_is_the_default_device():
    assert target_device() == jax.devices()[0]
    with jax.default_device(jax.devices()[3]):
        assert target_device() == jax.devices()[3]
    with jax.default_device("cpu"):
        assert target_device() == jax.devices("cpu")[0]


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
