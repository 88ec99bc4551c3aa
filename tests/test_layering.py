"""Direction of dependency: jax -> hope_kernels -> hope_jax -> its models -> training -> online."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHAIN = {
    "hope_kernels": {"hope_jax", "flax", "optax", "orbax", "datasets", "grain"},
    "hope_jax": {"hope_jax.models", "hope_jax.training", "hope_jax.online", "flax", "orbax", "datasets", "grain"},
    "hope_jax.models": {"hope_jax.training", "hope_jax.online", "orbax", "datasets", "grain"},
    "hope_jax.online": {"orbax", "datasets", "grain", "fastapi", "experiments"},
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


ROOT = Path(__file__).parent.parent
FLAX = {"flax"}
TRAINING = {"orbax", "datasets", "grain", "rich", "matplotlib", "yaml", "tensorboardX", "tokenizers"}
SOURCES = {
    "kernels/hope_kernels": {"hope_jax", "experiments", "optax"} | FLAX | TRAINING,
    "hope_jax": {"hope_jax.models", "hope_jax.training", "hope_jax.online", "experiments"} | FLAX | TRAINING,
    "hope_jax/models": {"hope_jax.training", "hope_jax.online", "experiments"} | TRAINING,
    "hope_jax/training": {"hope_jax.online", "experiments"},
    "hope_jax/online": {"experiments"},
}


def _imports(path):
    """Everything a file imports, inside functions too, as dotted names with all their parents."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.rsplit(".", i)[0] for name in names for i in range(name.count(".") + 1)}


@pytest.mark.parametrize("folder", SOURCES)
def test_no_source_file_imports_a_layer_above_it(folder):
    """Imports inside functions included: what the table above cannot see. The command line stands on top of all."""
    files = [
        p for p in (ROOT / folder).glob("**/*.py" if "/" in folder else "*.py") if p.stem not in ("cli", "__main__")
    ]
    assert files
    wrong = {str(p.relative_to(ROOT)): _imports(p) & SOURCES[folder] for p in files}
    assert not {name: found for name, found in wrong.items() if found}
