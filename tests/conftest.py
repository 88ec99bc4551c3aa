"""A strict session: eight virtual CPU devices, rank promotion refused, warnings are errors (pyproject)."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)  # commands would keep their programs for later tests


@pytest.fixture
def x64():
    """Float64 for the length of one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def _clear_compiled_programs():
    """Compiled programs of one test module do not stay in memory for the next."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly(request):
    """Outside the kernels most of a test is compilation, and nothing measures speed."""
    jax.config.update("jax_disable_most_optimizations", "kernels" not in request.path.parts)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
