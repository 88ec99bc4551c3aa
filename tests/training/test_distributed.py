"""Several processes as one run: what they agree on, and what happens when one stops, dies or hangs."""

import dataclasses
import json
import os
import random
import re
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from hope_jax.training import distributed
from hope_jax.training.checkpoint import saved_step, saved_steps
from hope_jax.training.config import MeshConfig
from hope_jax.training.data import TrainBatches
from hope_jax.training.errors import EXIT_PREEMPTED, RunFailed, UserError
from hope_jax.training.interrupt import Interruption, Stop
from hope_jax.training.loop import train
from hope_jax.training.metrics import read_metrics
from hope_jax.training.run_dir import full_disk_named
from hope_jax.training.sharding import rows_on
from hope_jax.training.step import build_program
from hope_jax.training.watchdog import Watchdog
from tests.training import two_hosts
from tests.training.conftest import LINES
from tests.training.processes import Processes, overrides, run

THREE = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


def losses(run_dir):
    return [record["loss"] for record in read_metrics(run_dir) if "loss" in record]


def test_the_environment_says_whether_there_are_others():
    assert distributed.cluster({}) is None
    assert distributed.cluster({"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert distributed.cluster({"SLURM_NTASKS": "4"}) is None  # a batch script, not yet a step
    assert distributed.cluster({"SLURM_STEP_NUM_TASKS": "4"}) == {}  # jax knows the rest
    assert distributed.cluster({"OMPI_COMM_WORLD_SIZE": "2"}) == {}
    assert distributed.cluster(THREE) == {"coordinator_address": "host:1234", "num_processes": 4, "process_id": 3}


@pytest.mark.parametrize("name", THREE)
def test_an_environment_that_says_half(name):
    with pytest.raises(UserError, match=f"but {name} is not"):
        distributed.cluster({key: value for key, value in THREE.items() if key != name})
    if name != "JAX_COORDINATOR_ADDRESS":
        with pytest.raises(UserError, match=f"{name}=two must be a whole number"):
            distributed.cluster({**THREE, name: "two"})


def test_a_process_alone_agrees_with_itself():
    vote = distributed.Vote(jax.make_mesh((1,), ("x",)))
    assert [vote(value, jax.numpy.int32(7)) for value in (0, 2, 0)] == [(0, 7), (2, 7), (0, 7)]
    assert distributed.greatest(3) == 3 and distributed.first_of(None) is None
    assert distributed.roll_call("test") == []
    distributed.barrier("test", 1)
    with distributed.joined(100):
        assert distributed.is_primary() and not jax.distributed.is_initialized()


def test_rows_lie_where_the_mesh_says(small):
    program = build_program(dataclasses.replace(small, mesh=MeshConfig(data=2, fsdp=2)))
    array = np.arange(4 * 17, dtype=np.uint8).reshape(4, 17)
    placed = program.put_batch(array)
    np.testing.assert_array_equal(placed, array)
    assert [shard.data.shape for shard in placed.addressable_shards] == [(1, 17)] * 4


def test_a_host_makes_the_rows_of_its_devices_and_no_others(small, monkeypatch):
    """Two hosts of four devices; what lies on each device is cut from the whole batch, bit for bit."""
    program = build_program(dataclasses.replace(small, batch_size=8, mesh=MeshConfig(data=2, fsdp=2, tensor=2)))
    batches = TrainBatches(np.arange(2000, dtype=np.uint16), seed=0, batch=8, length=16)
    whole, row, made = batches[3], TrainBatches.row, []
    monkeypatch.setattr(TrainBatches, "row", lambda self, item: made.append(item) or row(self, item))
    for host, expected in ((0, [0, 1, 4, 5]), (1, [2, 3, 6, 7])):
        ours = set(program.mesh.devices[:, host].flat)
        rows = rows_on(program.batch_sharding, 8, ours)
        made.clear()
        local = batches.rows(3, rows)
        assert rows == expected and made == [3 * 8 + i for i in expected]

        def on_each(shape, sharding, cut, ours=ours):
            return {d: (index, cut(index)) for d, index in sharding.devices_indices_map(shape).items() if d in ours}

        with monkeypatch.context() as patch:
            patch.setattr(jax, "make_array_from_callback", on_each)
            placed = program.put_batch(local, rows, 8)
        assert len(placed) == 4
        for index, part in placed.values():
            np.testing.assert_array_equal(part, whole[index])
    assert program.rows_here(8) == list(range(8))  # a process alone


def test_sigterm_is_a_request_and_counts_more_than_ctrl_c(request):
    # As in a terminal: a process in the background of a shell is born deaf to SIGINT.
    deaf = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, deaf))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.requested == Stop.INTERRUPTED
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
            assert interruption.requested == Stop.PREEMPTED
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_sigterm_saves_once_and_the_run_continues(small, tmp_path, monkeypatch, capfd):
    make = TrainBatches.rows

    def preempt(self, step, which):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return make(self, step, which)

    with monkeypatch.context() as patch:
        patch.setattr(TrainBatches, "rows", preempt)
        first = train(small, tmp_path / "run", resume=None)
    assert first.stop == Stop.PREEMPTED and first.interrupted and saved_steps(tmp_path / "run") == [2, 3]
    assert "then leaving (SIGTERM)" in capfd.readouterr().err
    second = train(small, tmp_path / "run", resume=None)
    assert second.started_at == 3 and second.stop == Stop.NO
    whole = train(small, tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(second.state), jax.device_get(whole.state))


def test_a_stall_is_reported_once_with_process_step_and_stack(tmp_path, capsys):
    def stuck_here(watchdog):
        for _ in range(200):
            if (tmp_path / "stalls.txt").exists():
                return
            time.sleep(0.05)

    with Watchdog(0.2, tmp_path) as watchdog:
        watchdog.beat(7)
        stuck_here(watchdog)
    text = capsys.readouterr().err
    assert text.startswith("hope: process 0 has finished no step for 0.2 s, the last was step 7; ")
    assert "stuck_here" in text and text.count("hope:") == 1
    assert (tmp_path / "stalls.txt").read_text() == text
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_a_run_that_moves_is_not_reported(tmp_path):
    with Watchdog(30, tmp_path) as watchdog:
        watchdog.beat(1)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_between_saves_is_named(tmp_path):
    with pytest.raises(RunFailed, match=r"the disk of .* is full"), full_disk_named(tmp_path):
        raise OSError(28, "No space left on device")
    with pytest.raises(FileNotFoundError), full_disk_named(tmp_path):
        raise FileNotFoundError(2, "No such file")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def config(small):
    """Slow levels and two microbatches, over four rows: one to four processes."""
    model = dataclasses.replace(small.model, name="hope_attention", cms_hidden=(16, 16))
    return dataclasses.replace(
        small, model=model, cms_periods=(1, 3), batch_size=8, accumulate=2, steps=12, eval_every=100, sample_bytes=0
    )


def words(config, run_dir, *more, devices=1):
    placed = dataclasses.replace(config, mesh=MeshConfig(fsdp=devices))
    return [*overrides(placed), *more, "--run", str(run_dir), "--auto-resume"]


@pytest.fixture(scope="module")
def alone(config, cache, tmp_path_factory):
    """The losses of one process on one device."""
    path = tmp_path_factory.mktemp("alone")
    run(["smoke", *words(config, path / "run")], 1, cache=cache, log=path)
    return losses(path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_train_the_curve_of_one(config, cache, alone, tmp_path, count):
    outputs = run(["smoke", *words(config, tmp_path / "run", devices=count)], count, cache=cache, log=tmp_path)
    np.testing.assert_allclose(losses(tmp_path / "run"), alone, rtol=1e-5)
    assert len(alone) == 12 and "step 12/12" in outputs[0]
    assert not any("step" in output for output in outputs[1:])


@pytest.mark.slow
def test_each_host_makes_its_rows_and_one_reads_for_those_that_share_a_cache(cache, tmp_path):
    table, program = tmp_path / "table.jsonl", [str(Path(two_hosts.__file__))]
    table.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    outputs = run([str(table), str(tmp_path)], 2, cache=cache, log=tmp_path / "log", program=program)
    first, second = ([line for line in output.splitlines() if line.startswith("host: ")] for output in outputs)
    assert (first[0], second[0]) == ("host: rows 0 1 2 3", "host: rows 4 5 6 7")
    assert first[4] == second[4] == "host: made 8"  # four rows of each of two steps
    read = [[int(line.split()[2]) for line in lines[1:4]] for lines in (first, second)]
    assert read == [[1, 1, 0], [0, 1, 0]]  # shared, own, and shared once more
    assert len({line.split()[3] for line in (*first[1:4], *second[1:4])}) == 1
    assert {len(list((tmp_path / name).iterdir())) for name in ("shared", "own0", "own1")} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("stages", [[(1, 1), (2, 1), (4, 1)], [(1, 8), (1, 4), (1, 8)]], ids=["processes", "devices"])
def test_a_run_continues_on_another_topology(config, cache, alone, tmp_path, stages):
    """(processes, devices of each); 4 and 7 are in the middle of a slow level's chunk.

    The checkpoint that the last stage would begin with is damaged: all its processes take the one before.
    """
    config = dataclasses.replace(config, batch_size=16) if stages[0][1] == 8 else config
    if config.batch_size == 16:
        run(["smoke", *words(config, tmp_path / "alone")], 1, cache=cache, log=tmp_path)
        alone = losses(tmp_path / "alone")
    for (count, devices), steps in zip(stages, (4, 7, 12), strict=True):
        if steps == 12:
            path = tmp_path / "run" / "ckpt" / "7" / "state" / "manifest.ocdbt"
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        typed = words(config, tmp_path / "run", f"steps={steps}", "decay_steps=12", devices=count * devices)
        outputs = run(["smoke", *typed], count, cache=cache, log=tmp_path / str(steps), devices=devices)
    assert "ckpt/7 is damaged (state/manifest.ocdbt: other bytes" in outputs[0]
    assert not any("damaged" in output for output in outputs[1:])
    np.testing.assert_allclose(losses(tmp_path / "run"), alone, rtol=1e-5)
    meta = json.loads((tmp_path / "run" / "ckpt" / "12" / "meta" / "metadata").read_text())
    assert (meta["processes"], meta["mesh"]["fsdp"]) == (stages[-1][0], stages[-1][0] * stages[-1][1])


@pytest.mark.slow
@pytest.mark.parametrize(("count", "sync"), [(1, False), (4, False), (1, True)])
def test_killed_at_random_moments(config, cache, tmp_path, count, sync):
    """20 times SIGKILL, to a random process at a random moment, then the same command again.

    Every other time the moment is after a new checkpoint, else it may be in the start too. `pytest -s` shows each.
    """
    rng, every, run_dir = random.Random(count), 5, tmp_path / "run"
    config = dataclasses.replace(config, steps=100_000, warmup_steps=2, checkpoint_every=every, keep_checkpoints=3)
    config = dataclasses.replace(config, sync_checkpoints=sync)
    typed = ["smoke", *words(config, run_dir, "decay_steps=1000", devices=count)]
    seen: dict[float, float] = {}  # the loss of every step that was ever recorded
    start_seconds, gained, in_a_save = 10.0, [], 0
    for kill in range(20):
        complete, began = saved_step(run_dir) or 0, time.monotonic()
        with Processes(typed, count, cache=cache, log=tmp_path / f"log{kill}") as processes:
            if kill % 2 == 0:
                processes.wait_for(lambda before=complete: (saved_step(run_dir) or 0) > before)
                start_seconds = time.monotonic() - began
                time.sleep(rng.uniform(0, 1))
            else:
                time.sleep(rng.uniform(0, 1.2 * start_seconds))
            processes.kill(victim := rng.randrange(count))
            alone = not processes.end_within(10)  # before they have joined, the others wait; a launcher ends them
            assert "damaged" not in processes.outputs()
        partial = bool(list((run_dir / "ckpt").glob("*.orbax*")))
        in_a_save += partial
        steps = {record["step"]: record["loss"] for record in read_metrics(run_dir) if "loss" in record}
        assert sorted(steps) == list(range(1, len(steps) + 1))
        # Steps that were done before were done again bit for bit: the start was from a whole checkpoint.
        assert all(steps[step] == seen[step] for step in steps.keys() & seen.keys())
        seen.update(steps)
        last, now = max(steps, default=0), saved_step(run_dir) or 0
        # The save in progress is lost too, whether or not its directory is there already. The next save waits for it,
        # or, with synchronous saves, the next step does.
        assert last - now <= (every if sync else 2 * every), (last, now)
        gained.append(now - complete)
        how = ", in a save" * partial + ", others ended" * alone
        print(f"kill {kill}: process {victim}, {complete} -> {last}, saved {now}{how}")
    print(f"{count} processes: {len(seen)} steps, {in_a_save} of 20 kills in a save, steps gained {gained}")
    assert all(gain > 0 for gain in gained[::2])


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes(config, cache, tmp_path):
    run_dir = tmp_path / "run"
    typed = ["smoke", *words(dataclasses.replace(config, steps=100_000), run_dir, "decay_steps=1000", devices=2)]
    with Processes(typed, 2, cache=cache, log=tmp_path) as processes:
        processes.wait_for(lambda: len(losses(run_dir)) > 4)
        processes.members[1].send_signal(signal.SIGTERM)
        assert processes.wait() == [EXIT_PREEMPTED] * 2, processes.outputs()
        found = re.search(r"hope: preempted; step (\d+) is saved", processes.output(0))
    assert found and saved_step(run_dir) == int(found[1]) == len(losses(run_dir))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "freezes"])
def test_the_process_that_is_gone_is_named(config, cache, tmp_path, stop):
    """Process 1 of two dies, or stands still; process 0 says which."""
    run_dir = tmp_path / "run"
    more = ["decay_steps=1000", "stall_seconds=10", "heartbeat_seconds=60"]
    typed = ["smoke", *words(dataclasses.replace(config, steps=100_000), run_dir, *more, devices=2)]
    with Processes(typed, 2, cache=cache, log=tmp_path) as processes:
        processes.wait_for(lambda: len(losses(run_dir)) > 4)
        os.kill(processes.members[1].pid, stop)
        if stop == signal.SIGKILL:
            assert processes.members[0].wait(90) == RunFailed.status, processes.outputs()
            assert "hope: process 0: process 1 is gone" in processes.output(0)
        else:
            deadline = time.monotonic() + 60
            while "no answer from process 1" not in processes.output(0) and time.monotonic() < deadline:
                time.sleep(0.5)
            assert "no answer from process 1; its main thread" in processes.output(0), processes.outputs()
            assert "no answer from process 1" in (run_dir / "stalls.txt").read_text()
