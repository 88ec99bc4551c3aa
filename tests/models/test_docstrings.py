"""Every example in a docstring of the models runs and prints what it says."""

import doctest
import importlib
import pkgutil

import jax
import pytest

import hope_jax.models

NAMES = sorted(m.name for m in pkgutil.iter_modules(hope_jax.models.__path__, "hope_jax.models."))


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name):
    """Without the strict session: a reader does not start from it."""
    with jax.numpy_rank_promotion("allow"):
        assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_examples_exist_where_a_reader_starts():
    found = {name.rpartition(".")[2]: doctest.DocTestFinder().find(importlib.import_module(name)) for name in NAMES}
    with_examples = {name for name, tests in found.items() if any(test.examples for test in tests)}
    assert {"build", "config", "functional", "sizing", "stacking"} <= with_examples
