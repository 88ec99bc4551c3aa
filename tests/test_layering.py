"""Direction of dependency: jax -> hope_kernels -> hope_jax -> hope_jax.models -> hope_jax.training."""

import json
import os
import subprocess
import sys

import pytest

CHAIN = {
    "hope_kernels": {"hope_jax", "flax", "optax", "orbax", "datasets", "grain"},
    "hope_jax": {"hope_jax.models", "hope_jax.training", "flax", "orbax", "datasets", "grain"},
    "hope_jax.models": {"hope_jax.training", "orbax", "datasets", "grain"},
}


@pytest.mark.parametrize("name", CHAIN)
def test_importing_a_layer_imports_none_above_it(name):
    """In a fresh interpreter, where nothing else has been imported yet."""
    program = f"import json, sys, {name}; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu", "PATH": ""},
    )
    loaded = set(json.loads(out.stdout))
    assert name in loaded
    assert not loaded & CHAIN[name]
