"""The examples in the docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import hope_jax.training

MODULES = [module.name for module in pkgutil.iter_modules(hope_jax.training.__path__, "hope_jax.training.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    found = [doctest.DocTestFinder().find(importlib.import_module(name)) for name in MODULES]
    assert sum(bool(test.examples) for tests in found for test in tests) >= 8
