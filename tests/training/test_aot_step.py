"""Training steps compile for TPUs that are not there. Needs libtpu only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from hope_jax.models import build_lm
from hope_jax.training import presets
from hope_jax.training.optimizer import build_optimizer
from hope_jax.training.step import init_state
from hope_kernels.aot import ENVIRONMENT
from tests.training import aot_step

pytest.importorskip("libtpu")
pytestmark = [pytest.mark.aot, pytest.mark.slow]


def python(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("axes", [("mesh.data=2", "mesh.tensor=2"), ("mesh.data=2", "mesh.sequence=2")])
def test_kernels_run_on_a_mesh(axes):
    """A mixer whose calls a kernel would take: each device runs the kernel on its own rows and heads."""
    done = python(str(Path(aot_step.__file__)), "v5e:2x2", *axes)
    assert done.returncode == 0, done.stderr[-2000:]
    *calls, last = done.stdout.splitlines()
    assert calls and all("delta_rule: 'pallas_tpu' runs" in call for call in calls)
    assert last == "compiled"


def report(*words: str) -> dict:
    done = python("-m", "hope_jax", "aot", *words, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def state_bytes(name: str) -> int:
    """Of the whole training state of a preset."""
    config = presets.preset(name)
    state = jax.eval_shape(lambda: init_state(build_lm(config.model), build_optimizer(config), config.seed))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("preset", ["350m", "350m_transformer"])
def test_350m_fits_sixteen_v5e(preset):
    found = report(preset, "--topology", "v5e:4x4", "--mesh", "fsdp=16", "batch_size=32")
    assert found["total"] < 0.85 * found["available"]
    # The state is divided, not copied: parameters, moments, and the gradients that wait for the slow levels.
    assert found["params"] + found["opt_state"] < 1.1 * state_bytes(preset) / 16


@pytest.mark.parametrize("preset", ["1.3b", "1.3b_transformer"])
@pytest.mark.parametrize(
    ("topology", "mesh"),
    [("v5e:16x16", "fsdp=128,tensor=2"), ("v5p:8x4x4", "fsdp=128"), ("v6e:16x16", "fsdp=128,tensor=2")],
)
def test_published_size_fits_a_pod(preset, topology, mesh):
    found = report(preset, "--topology", topology, "--mesh", mesh)
    assert found["total"] < 0.85 * found["available"]
    assert {call["kind"] for call in found["collectives"]} & {"all-gather", "reduce-scatter", "all-reduce"}


def test_too_little_memory_is_said():
    words = ("1.3b_transformer", "model.remat=none", "--topology", "v5e:2x2", "--mesh", "fsdp=4")
    done = python("-m", "hope_jax", "aot", *words)
    assert done.returncode == 1
    assert "does not compile on data=1,fsdp=4" in done.stderr and "memory" in done.stderr.lower()
