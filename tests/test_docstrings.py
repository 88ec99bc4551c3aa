"""Every example in a docstring of the core runs and prints what it says."""

import doctest
import importlib
import inspect
import pkgutil

import jax
import numpy as np
import pytest

import hope_jax

CORE = sorted(m.name for m in pkgutil.iter_modules(hope_jax.__path__, "hope_jax.") if not m.ispkg)
CORE = [name for name in CORE if name.rpartition(".")[2] not in ("__main__", "cli")]

LONG = {"hope_jax.sequence", "hope_jax.self_modifying", "hope_jax.memory_layer"}  # they compile a dozen layers

PUBLIC = [name for name in hope_jax.__all__ if inspect.isfunction(getattr(hope_jax, name))]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in CORE])
def test_examples_run(name):
    """Under numpy's plain printing and without the strict session: a reader starts from neither."""
    module = importlib.import_module(name)
    with np.printoptions(), jax.numpy_rank_promotion("allow"):
        result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_the_modules_of_the_core_are_found():
    assert {"hope_jax.nesting", "hope_jax.transforms", "hope_jax.self_modifying"} <= set(CORE)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_open_with_one_line(name):
    doc = inspect.getdoc(getattr(hope_jax, name))
    assert doc
    first, *rest = doc.splitlines()
    assert first.endswith((".", ":", ")")) and first[0] != " "
    assert not rest or not rest[0]


def test_all_is_what_can_be_imported():
    for name in hope_jax.__all__:
        assert hasattr(hope_jax, name)
