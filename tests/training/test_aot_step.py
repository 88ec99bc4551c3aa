"""A training step whose mixer makes calls that a kernel would take compiles for several TPUs. Needs libtpu only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hope_kernels.aot import ENVIRONMENT
from tests.training import aot_step

pytest.importorskip("libtpu")
pytestmark = [pytest.mark.aot, pytest.mark.slow]


def test_the_step_compiles_on_a_mesh():
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    axes = {"data": 2, "fsdp": 1, "tensor": 2}
    program = [sys.executable, str(Path(aot_step.__file__)), "v5e:2x2", json.dumps(axes)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    *calls, last = done.stdout.splitlines()
    reason = "'pallas_tpu' cannot run: the compiler cannot divide a kernel over a mesh (data 2, fsdp 1, tensor 2)"
    assert calls and all(f"delta_rule: 'xla' runs; {reason}" in call for call in calls)
    assert last == "compiled"
