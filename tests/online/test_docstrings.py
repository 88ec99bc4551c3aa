"""Every example in a docstring of the sessions runs and prints what it says."""

import doctest
import importlib
import pkgutil

import jax
import pytest

import hope_jax.online

NAMES = sorted(m.name for m in pkgutil.iter_modules(hope_jax.online.__path__, "hope_jax.online."))
WITH_EXAMPLES = {"session", "gates", "stream", "consolidate", "fingerprint"}


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name):
    """Without the strict session: a reader does not start from it."""
    module = importlib.import_module(name)
    with jax.numpy_rank_promotion("allow"):
        result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted or name.rpartition(".")[2] not in WITH_EXAMPLES
