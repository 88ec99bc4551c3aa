"""Real processes of `hope train` on loopback: started together, killed on purpose, and never left behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from hope_jax.training.config import TrainConfig
from hope_jax.training.overrides import leaves
from hope_jax.training.presets import preset

PATIENCE = 240  # seconds for a start under load
HOPE_TRAIN = ("-m", "hope_jax", "train")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def overrides(config: TrainConfig) -> list[str]:
    """The key=value words that make the smoke preset this config."""
    base = leaves(preset("smoke"))
    words = {key: value for key, value in leaves(config).items() if value != base[key]}
    return [f"{key}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in words.items()]


class Processes:
    """`count` processes of one command; use as a context manager, which ends those that are left.

    Args:
      words: of `hope train`, the same in each.
      count: how many; one runs alone, without a coordinator.
      cache: the directory of compiled programs.
      devices: virtual devices of each.
      log: where their output goes, one file each.
      program: of Python, in the place of `hope train`.
    """

    def __init__(self, words: list[str], count: int, *, cache: Path, log: Path, devices: int = 1, program=HOPE_TRAIN):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(cache / f"{count}x{devices}"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        log.mkdir(parents=True, exist_ok=True)
        address = f"localhost:{free_port()}"
        self._logs = [log / f"{i}.txt" for i in range(count)]
        self.members: list[subprocess.Popen] = []
        for i, path in enumerate(self._logs):
            joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
            with path.open("w") as out:
                self.members.append(
                    subprocess.Popen(
                        [sys.executable, *program, *words],
                        env={**environment, **(joined if count > 1 else {})},
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )

    def output(self, index: int) -> str:
        """What one of them has printed so far."""
        return self._logs[index].read_text(errors="replace")

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """The exit statuses of all."""
        deadline = time.monotonic() + seconds
        return [member.wait(max(0.1, deadline - time.monotonic())) for member in self.members]

    def wait_for(self, reached, seconds: float = PATIENCE) -> None:
        """Until `reached()`; fails when one of them ends before."""
        deadline = time.monotonic() + seconds
        while not reached():
            assert all(member.poll() is None for member in self.members), self.outputs()
            assert time.monotonic() < deadline, self.outputs()
            time.sleep(0.05)

    def outputs(self) -> str:
        """What all of them have printed, for the message of a failed test."""
        return "\n".join(f"--- {i}: {self.members[i].poll()}\n{self.output(i)}" for i in range(len(self.members)))

    def end_within(self, seconds: float) -> bool:
        """Whether all have ended by then, of themselves."""
        deadline = time.monotonic() + seconds
        while any(member.poll() is None for member in self.members):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def kill(self, index: int) -> None:
        """SIGKILL to one of them."""
        self.members[index].send_signal(signal.SIGKILL)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *exc) -> None:
        for member in self.members:
            if member.poll() is None:
                member.kill()
            member.wait()


def run(words: list[str], count: int, **options) -> list[str]:
    """Runs to the end, expects status 0 from all; what each printed."""
    with Processes(words, count, **options) as processes:
        statuses = processes.wait()
        assert statuses == [0] * count, processes.outputs()
        return [processes.output(i) for i in range(count)]
