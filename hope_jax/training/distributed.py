"""Several processes as one run: joining, who writes, agreeing on a number, and waiting for one another.

Every process runs the same command. jax finds the others where the environment tells it (`cluster`); a process
alone needs none of this and every function below is then a constant. Process 0 is the one that writes and
prints; all processes read the same run directory.
"""

import contextlib
import functools
import glob
import itertools
import os
import shutil
import sys
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.training.errors import EXIT_INTERRUPTED, RunFailed, UserError

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
FAREWELL_SECONDS = 20  # how long a process that is done waits for the others
ROLL_CALL_SECONDS = 5  # how long the others have to answer when one is missing


def cluster(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize` that an environment asks for, None for a process alone.

    Args:
      environment: of the process. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say everything;
        a Slurm step, an Open MPI job and a Cloud TPU pod are left to jax, which knows them.
    Raises:
      UserError: one of the three is missing or is not a number.

    >>> cluster({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"})
    {'coordinator_address': 'a:1', 'num_processes': 2, 'process_id': 1}
    >>> cluster({}) is None
    True
    """
    given = [name for name in EXPLICIT if environment.get(name)]
    if given:
        missing = [name for name in EXPLICIT if name not in given]
        if missing:
            raise UserError(f"{given[0]} is set but {missing[0]} is not; set {', '.join(EXPLICIT)}, or none of them")
        address, processes, process = (environment[name] for name in EXPLICIT)
        return {
            "coordinator_address": address,
            "num_processes": _number(EXPLICIT[1], processes),
            "process_id": _number(EXPLICIT[2], process),
        }
    tasks = (environment.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    return {} if any(number not in ("0", "1") for number in tasks) or _on_tpu(environment) else None


def _number(name: str, value: str) -> int:
    if not value.isdecimal():
        raise UserError(f"{name}={value} must be a whole number")
    return int(value)


def _on_tpu(environment: Mapping[str, str]) -> bool:
    """Whether this is a host of a Cloud TPU and the TPU will be used."""
    wanted = environment.get("JAX_PLATFORMS", "tpu").split(",")
    return "tpu" in wanted and bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


@contextlib.contextmanager
def joined(heartbeat_seconds: int) -> Iterator[None]:
    """Joins the other processes where there are some, and leaves them at the end.

    A process that fails prints its message and ends at once: the farewell of jax would wait for the others,
    which wait for this one in a step.

    Args:
      heartbeat_seconds: a process that was silent for so long counts as dead, and jax ends the others with a
        message that names it.
    Raises:
      UserError: the environment is contradictory.
    """
    arguments = cluster(os.environ)
    if arguments is None or jax.distributed.is_initialized():
        yield
        return
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours, see interrupt.py
    try:
        jax.distributed.initialize(
            **arguments,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=FAREWELL_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        if arguments or "coordinator_address" not in str(error):
            kind = UserError if isinstance(error, ValueError) else RunFailed  # those that do not come may come later
            raise kind(f"the processes could not join: {' '.join(str(error).split())}") from error
        yield  # a TPU host that belongs to no pod
        return
    try:
        yield
    except (UserError, RunFailed) as error:
        _leave_at_once(f"hope: process {index()}: {error}", error.status)
    except jax.errors.JaxRuntimeError as error:
        missing = roll_call("after an error")
        who = f"process {_list(missing)} is gone: " if missing else ""
        _leave_at_once(f"hope: process {index()}: {who}{' '.join(str(error).split())[:500]}", RunFailed.status)
    except KeyboardInterrupt:
        _leave_at_once("hope: interrupted", EXIT_INTERRUPTED)
    except BaseException as error:
        _leave_at_once("".join(traceback.format_exception(error)), RunFailed.status)
    jax.distributed.shutdown()


def _leave_at_once(message: str, status: int) -> None:
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def index() -> int:
    """The index of this process."""
    return jax.process_index()


def is_primary() -> bool:
    """Whether this process writes the run directory and prints."""
    return index() == 0


def say(text: str) -> None:
    """A line on stderr, once for the run."""
    if is_primary():
        print(f"hope: {text}", file=sys.stderr, flush=True)


def greatest(value: int) -> int:
    """The greatest of the values that the processes give; all wait for it."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import process_allgather

    return int(np.max(process_allgather(np.asarray(value, np.int32))))


def first_of(text: str | None) -> str | None:
    """The text of the first process that has one, None if none has; all wait for it."""
    if jax.process_count() == 1:
        return text
    from jax.experimental.multihost_utils import process_allgather

    line = (text or "").encode()[:512].ljust(512)
    lines = [bytes(row).decode(errors="replace").strip() for row in process_allgather(np.frombuffer(line, np.uint8))]
    return next((line for line in lines if line), None)


def is_first_at(place: Path) -> bool:
    """Whether this process is the first of those that see the same `place`, on a disk of their own or a shared one.

    All processes ask together. Each leaves its number in a folder that is named after the run and looks who else did.

    Args:
      place: a path that need not exist, in a folder that can be written.
    """
    if jax.process_count() == 1:
        return True
    run = first_of(uuid.uuid4().hex if is_primary() else None)
    roll = place.with_name(f".{place.name}.{run}")
    roll.mkdir(parents=True, exist_ok=True)
    (roll / str(index())).touch()
    barrier(f"roll at {place}")
    first = min(int(path.name) for path in roll.iterdir())
    barrier(f"roll at {place}")  # all have looked
    shutil.rmtree(roll, ignore_errors=True)
    return first == index()


class Vote:
    """The greatest of the numbers that the processes give at the same step, without waiting: one step late.

    The number travels in a program of its own between two training steps, and is read when the next one is given,
    so every process learns the same number at the same step. A process alone hears its own at once.

    On a CPU nothing keeps two programs from exchanging data at the same time, and gloo then mixes them up. So an
    array goes through this program from one training step to the next: each waits for the one before.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        everyone = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
        nobody = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._place = functools.partial(jax.make_array_from_callback, (mesh.size,), everyone)
        self._max = jax.jit(lambda votes, link: (votes.max(), jnp.copy(link)), out_shardings=(nobody, nobody))
        self._cast: jax.Array | None = None

    def __call__(self, value: int, link: jax.Array) -> tuple[int, jax.Array]:
        """Gives a number, hears the outcome of the call before (0 at the first).

        Args:
          value: of this process.
          link: [] a result of the training step before, whole on every device.
        Returns:
          (the outcome, the link for the next training step).
        """
        if jax.process_count() == 1:
            return value, link
        before = self._cast
        self._cast, link = self._max(self._place(lambda _: np.full((1,), value, np.int32)), link)
        return (0 if before is None else int(before)), link


_names = itertools.count()  # the same on every process: all of them meet at the same places


def barrier(name: str, seconds: float = 600) -> None:
    """Waits until every process is here.

    Args:
      name: of the place, for the message.
      seconds: how long at most.
    Raises:
      RunFailed: some did not come; the message names them.
    """
    if jax.process_count() == 1:
        return
    key = f"hope/barrier/{next(_names)}"
    client = _client()
    client.key_value_set(f"{key}/{index()}", "here")
    try:
        client.wait_at_barrier(key, int(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        missing = _list(_absent(key))
        raise RunFailed(
            f"waited {seconds:g} s at {name!r} for process {missing}; look at what that process printed last"
        ) from error


def roll_call(reason: str, seconds: float = ROLL_CALL_SECONDS) -> list[int]:
    """Who is missing, asked by processes that all see at about the same time that something is wrong.

    Args:
      reason: the same in all of them; an answer stands until `withdraw`.
      seconds: how long to wait for the answers of the others.
    Returns:
      The indices of the processes that did not answer.
    """
    if jax.process_count() == 1:
        return []
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(_answer(reason), "here", allow_overwrite=True)
        time.sleep(seconds)
        return _absent(f"hope/roll_call/{reason}")
    return []


def withdraw(reason: str) -> None:
    """Takes back the answer of this process to a roll call."""
    if jax.process_count() > 1:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().key_value_delete(_answer(reason))


def _answer(reason: str) -> str:
    return f"hope/roll_call/{reason}/{index()}"


def agree(what: str, text: str) -> None:
    """Refuses a run whose processes do not say the same.

    Args:
      what: the text is of, for the message.
      text: of this process.
    Raises:
      UserError: on every process; the message names those that differ from the first.
    """
    if jax.process_count() == 1:
        return
    key = f"hope/agree/{next(_names)}"
    _client().key_value_set(f"{key}/{index()}", text)
    barrier(what)
    said = {int(name.rpartition("/")[2]): other for name, other in _client().key_value_dir_get(key)}
    others = sorted(number for number, other in said.items() if other != said[0])
    if others:
        raise UserError(
            f"process {_list(others)} has another {what} than process 0 ({said[others[0]]} there, {said[0]} here); "
            "give every process the same command, the same text and the same Python"
        )


def _absent(key: str) -> list[int]:
    try:
        present = {int(name.rpartition("/")[2]) for name, _ in _client().key_value_dir_get(key)}
    except jax.errors.JaxRuntimeError:
        return [0]  # who keeps the list
    return [number for number in range(jax.process_count()) if number not in present]


def _list(indices: list[int]) -> str:
    return ", ".join(map(str, indices)) or "?"


def _client() -> Any:
    from jax._src.distributed import global_state  # no public name; orbax does the same

    return global_state.client


def check_mesh(mesh: jax.sharding.Mesh) -> None:
    """Refuses a mesh that leaves out devices of a run of several processes.

    Raises:
      UserError: a process would have nothing to compute, and wait forever.
    """
    if jax.process_count() > 1 and mesh.size != jax.device_count():
        raise UserError(
            f"{jax.process_count()} processes have {jax.device_count()} devices, the mesh {dict(mesh.shape)} takes "
            f"{mesh.size}; make mesh.data * mesh.fsdp * mesh.tensor equal to {jax.device_count()}"
        )
