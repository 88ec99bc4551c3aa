"""A child process that outlives nobody: its parent is killed, and it ends. This module is parent and child too."""

import fcntl
import subprocess
import sys
import time
from pathlib import Path

from hope_kernels import child

HERE = "tests.kernels.test_child"


def work(folder):
    """Hold the lock as long as this process lives, longer than the test waits for its end."""
    with Path(folder, "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        Path(folder, "started").touch()
        time.sleep(60)


def wait_until(reached, seconds=60.0):
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.05)


def is_free(path):
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_the_child_ends_with_its_parent(tmp_path):
    run = f"child.run({HERE!r}, {str(tmp_path)!r}, work, None, {{}})"
    program = f"from hope_kernels import child; from {HERE} import work; {run}"
    environment = {"PYTHONPATH": ":".join(p for p in sys.path if p), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen([sys.executable, "-c", program], env=environment) as parent:
        try:
            wait_until((tmp_path / "started").exists)
            assert not is_free(tmp_path / "lock")
        finally:
            parent.kill()
    wait_until(lambda: is_free(tmp_path / "lock"), seconds=10.0)


if __name__ == "__main__":
    folder, build, _ = child.described(sys.argv)
    build(folder)
