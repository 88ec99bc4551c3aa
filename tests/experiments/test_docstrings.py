"""Every example in a docstring of the experiments runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import experiments

MODULES = sorted(module.name for module in pkgutil.iter_modules(experiments.__path__, "experiments."))


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_modules_are_found():
    assert {"experiments.options", "experiments.report"} <= set(MODULES)
