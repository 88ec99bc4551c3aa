"""Checkpoints: what is saved, what is kept, and that no damaged or partial one is ever used."""

import dataclasses
import json
import shutil
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.training import checkpoint
from hope_jax.training.checkpoint import Checkpoints, describe, fingerprints, saved_steps
from hope_jax.training.checksums import find_damage
from hope_jax.training.config import MeshConfig
from hope_jax.training.data import TrainBatches
from hope_jax.training.errors import RunFailed, UserError
from hope_jax.training.files import write_text
from hope_jax.training.load import load_run
from hope_jax.training.loop import train
from hope_jax.training.metrics import read_metrics
from hope_jax.training.step import build_program

SUM = "0" * 64


@pytest.fixture(scope="module")
def program(small):
    return build_program(small)


@pytest.fixture(scope="module")
def state(program):
    return jax.device_get(program.init())


def at(program, state, step):
    """The state with another step."""
    placed = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), state, program.abstract_state)
    return placed._replace(step=jax.device_put(jnp.int32(step), program.abstract_state.step.sharding))


def meta(small, program, step):
    return describe(step, small, SUM, program.mesh)


def save(checkpoints, small, program, state, *steps):
    for step in steps:
        checkpoints.save(at(program, state, step), meta(small, program, step))
    checkpoints.wait()


def restored_step(checkpoints, small, program):
    return int(checkpoints.restore(program.abstract_state, fingerprints(small, SUM))[0].step)


@pytest.fixture(scope="module")
def saved(small, program, state, tmp_path_factory):
    """A run directory with checkpoints 2 and 4."""
    run_dir = tmp_path_factory.mktemp("saved")
    with Checkpoints(run_dir) as checkpoints:
        save(checkpoints, small, program, state, 2, 4)
    return run_dir


@pytest.fixture
def run_dir(saved, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(saved, tmp_path / "run")


def files(directory):
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def test_what_is_saved_is_the_state_at_that_step_whatever_follows(tmp_path):
    """The steps after a save donate the buffers that the writer reads; a state large enough to be still writing."""
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("x",)), jax.sharding.PartitionSpec())

    def place(leaf):
        return jax.device_put(leaf, sharding)

    from hope_jax.training.step import TrainState

    params = {f"w{i}": place(jnp.full((256, 1024), float(i))) for i in range(32)}
    state = TrainState(place(jnp.int32(0)), params, ())
    step = jax.jit(lambda s: TrainState(s.step + 1, jax.tree.map(lambda w: w + 1, s.params), ()), donate_argnums=0)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for saved in (1, 11, 21):
            state = step(state)
            assert int(state.step) == saved
            checkpoints.save(state, {})
            for _ in range(9):
                state = step(state)
        checkpoints.wait()
        for saved in (1, 11, 21):
            read = checkpoints._manager.restore(
                saved,
                args=checkpoints._ocp.args.Composite(
                    state=checkpoints._ocp.args.StandardRestore(jax.tree.map(lambda x: x, state))
                ),
            )["state"]
            for i in range(32):
                np.testing.assert_array_equal(read.params[f"w{i}"], np.full((256, 1024), float(i + saved)))


def test_a_buffer_that_is_viewed_is_not_reused():
    """What asynchronous saves on a CPU rest on: orbax reads numpy views of arrays that the next step donates."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    before = step(jnp.zeros(1000))
    view = np.asarray(before)
    assert view.ctypes.data == before.unsafe_buffer_pointer()
    after = step(before)
    assert after.unsafe_buffer_pointer() != view.ctypes.data
    np.testing.assert_array_equal(view, np.ones(1000))


def test_latest_and_every_are_kept(small, program, state, tmp_path):
    with Checkpoints(tmp_path, keep=2, keep_every=4) as checkpoints:
        save(checkpoints, small, program, state, 2, 4, 6, 8, 10, 12)
    assert saved_steps(tmp_path) == [4, 8, 10, 12]


def test_meta_says_what_wrote_it(run_dir, small, program):
    there = json.loads((run_dir / "ckpt" / "4" / "meta" / "metadata").read_text())
    assert there["data_step"] == 4 and there["processes"] == 1 and there["mesh"]["data"] == 1
    assert there["versions"]["jax"] == jax.__version__
    assert {"hope_jax", "flax", "optax", "orbax-checkpoint"} < set(there["versions"])
    assert there == meta(small, program, 4)


def test_every_damaged_file_is_found_and_named(saved, tmp_path):
    """Each file cut short, with one bit flipped, and missing."""
    whole = saved / "ckpt" / "4"
    names = set(files(whole)) - {"_CHECKPOINT_METADATA", "commit_success.txt", "checksums.json"}
    assert {"meta/metadata", "state/manifest.ocdbt", "state/_METADATA"} < names
    assert find_damage(whole) is None
    for name in sorted(names):
        path = shutil.copytree(whole, tmp_path / "copy", dirs_exist_ok=True) / name
        content = path.read_bytes()
        if content:
            path.write_bytes(content[:-1])
            assert find_damage(tmp_path / "copy") == f"{name}: {len(content) - 1} bytes, {len(content)} were written"
            path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
            assert find_damage(tmp_path / "copy") == f"{name}: other bytes than were written"
        path.unlink()
        assert find_damage(tmp_path / "copy") == f"{name}: No such file or directory"


@pytest.mark.parametrize("read_only", [False, True])
def test_the_one_before_a_damaged_checkpoint_is_used(run_dir, small, program, state, capsys, read_only):
    path = run_dir / "ckpt" / "4" / "state" / "manifest.ocdbt"
    path.write_bytes(path.read_bytes()[:10])
    with Checkpoints(run_dir, read_only=read_only) as checkpoints:
        assert restored_step(checkpoints, small, program) == 2
        line = capsys.readouterr().err
        assert "ckpt/4 is damaged (state/manifest.ocdbt: 10 bytes, " in line and line.count("\n") == 1
        if read_only:
            assert saved_steps(run_dir) == [2, 4]
        else:
            assert (run_dir / "ckpt" / "4.damaged").is_dir()
            save(checkpoints, small, program, state, 4)  # the steps that were lost are saved again
            assert restored_step(checkpoints, small, program) == 4


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "commit_success.txt", "checksums.json"])
@pytest.mark.parametrize("content", [b"", b"{\xff", None])
def test_the_files_without_a_checksum(run_dir, small, program, name, content):
    """Nothing is read from the first two; without the last the checkpoint cannot be trusted."""
    path = run_dir / "ckpt" / "4" / name
    path.unlink() if content is None else path.write_bytes(content)
    with Checkpoints(run_dir) as checkpoints:
        assert restored_step(checkpoints, small, program) == (2 if name == "checksums.json" else 4)


def test_checkpoints_saved_before_there_were_checksums_are_used(run_dir, small, program, capsys):
    directory = run_dir / "ckpt" / "4"
    (directory / "checksums.json").unlink()
    path = directory / "meta" / "metadata"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "checksums"}))
    with Checkpoints(run_dir) as checkpoints:
        assert restored_step(checkpoints, small, program) == 4
    assert "without checksums" in capsys.readouterr().err


def test_when_every_checkpoint_is_damaged(run_dir, small, program):
    for step in (2, 4):
        (run_dir / "ckpt" / str(step) / "meta" / "metadata").unlink()
    with Checkpoints(run_dir) as checkpoints, pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        restored_step(checkpoints, small, program)


def test_a_run_whose_checkpoints_were_put_aside_does_not_begin_again(small, tmp_path):
    run_dir = tmp_path / "run"
    train(dataclasses.replace(small, steps=4), run_dir)
    for step in (2, 4):
        (run_dir / "ckpt" / str(step) / "meta" / "metadata").unlink()
    for _ in range(2):  # the second finds them put aside
        with pytest.raises(UserError, match=r"every checkpoint in .* is damaged; .*--overwrite"):
            train(small, run_dir, resume=True)
    assert [record["step"] for record in read_metrics(run_dir) if "loss" in record]


def test_a_partial_save_is_never_read_and_is_removed(run_dir, small, program, state):
    partial = run_dir / "ckpt" / "6.orbax-checkpoint-tmp"
    shutil.copytree(run_dir / "ckpt" / "4", partial)
    with Checkpoints(run_dir) as checkpoints:
        assert restored_step(checkpoints, small, program) == 4
        save(checkpoints, small, program, state, 6)
    assert sorted(path.name for path in (run_dir / "ckpt").iterdir()) == ["4", "6"]


def test_a_save_that_cannot_be_written(run_dir, small, program, state, monkeypatch):
    """The disk fills in the last moment; the state is still there and is saved when there is room."""
    with Checkpoints(run_dir) as checkpoints:
        with monkeypatch.context() as patch:

            def full(directory):
                raise OSError(28, "No space left on device", str(directory))

            patch.setattr("hope_jax.training.checkpoint.write_checksums", full)
            checkpoints.save(at(program, state, 6), meta(small, program, 6))
            with pytest.raises(RunFailed) as caught:
                checkpoints.wait()
        message = str(caught.value)
        assert "step 6 could not be saved in" in message and "(the disk is full)" in message
        assert "the checkpoint of step 4 is whole; free some space" in message and "\n" not in message
        assert sorted(path.name for path in (run_dir / "ckpt").iterdir()) == ["2", "4"]
        save(checkpoints, small, program, state, 6)
        assert restored_step(checkpoints, small, program) == 6


def test_a_disk_without_room_for_one_more_checkpoint(run_dir, small, program, state, monkeypatch):
    usage = shutil.disk_usage(run_dir)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with (
        Checkpoints(run_dir) as checkpoints,
        pytest.raises(RunFailed, match=r"no room to save step 6 .*step 4 is whole"),
    ):
        checkpoints.save(at(program, state, 6), meta(small, program, 6))
    assert saved_steps(run_dir) == [2, 4]


def test_a_run_continues_over_a_damaged_checkpoint(small, tmp_path, capsys):
    whole = train(small, tmp_path / "run")
    path = tmp_path / "run" / "ckpt" / "6" / "state" / "_METADATA"
    path.write_bytes(path.read_bytes()[:-1])
    assert int(load_run(tmp_path / "run").state.step) == 4
    again = train(small, tmp_path / "run", resume=True)
    assert again.started_at == 4 and capsys.readouterr().err.count("ckpt/6 is damaged (state/_METADATA: ") == 2
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.state), jax.device_get(whole.state))


@pytest.mark.parametrize("sync", [True, False])
def test_with_synchronous_saves_every_due_checkpoint_is_whole_before_the_next_step(small, tmp_path, monkeypatch, sync):
    """The disk is so slow that a save outlasts the steps: without the wait a kill would lose two intervals."""
    write, make, whole = checkpoint.write_checksums, TrainBatches.rows, []

    def slowly(directory):
        time.sleep(0.5)
        write(directory)

    def look(self, step, which):
        whole.append(max(saved_steps(tmp_path / "run"), default=0))
        return make(self, step, which)

    monkeypatch.setattr(checkpoint, "write_checksums", slowly)
    monkeypatch.setattr(TrainBatches, "rows", look)
    train(dataclasses.replace(small, sync_checkpoints=sync, eval_every=100), tmp_path / "run")
    due = [step - step % small.checkpoint_every for step in range(small.steps)]
    assert (whole == due) == sync and whole[-1] >= due[-1] - small.checkpoint_every


def test_writing_a_file_leaves_the_old_one_or_the_new(tmp_path):
    path = tmp_path / "facts.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \udcff")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("facts.json", "new")]


@pytest.mark.slow
def test_resume_at_every_step_is_bit_exact(small, tmp_path):
    """Levels that step every 1, 3 and 4 steps, two microbatches, a mesh: stopped at each step k, then continued."""
    model = dataclasses.replace(small.model, name="hope_attention", cms_hidden=(16, 16, 16))
    config = dataclasses.replace(
        small,
        model=model,
        cms_periods=(1, 3, 4),
        accumulate=2,
        mesh=MeshConfig(data=2),
        steps=13,
        eval_every=100,
        final_eval_batches=1,
        checkpoint_every=1,
        keep_checkpoints=13,
    )
    whole = jax.device_get(train(config, tmp_path / "whole").state)
    for k in range(1, config.steps):
        run_dir = tmp_path / str(k)
        shutil.copytree(tmp_path / "whole", run_dir, ignore=shutil.ignore_patterns("ckpt"))
        shutil.copytree(tmp_path / "whole" / "ckpt" / str(k), run_dir / "ckpt" / str(k))
        again = train(config, run_dir, resume=True)
        assert again.started_at == k
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.state), whole)
        shutil.rmtree(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("foreseen", [True, False])
def test_a_real_full_disk(text_file, tmp_path, foreseen):
    """A file system of 12 MB in a namespace of its own; without the look at the free space it fills in a save."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    run_dir = tmp_path / "run"
    script = textwrap.dedent(f"""
        import pathlib, shutil, sys
        from hope_jax.cli import main
        from hope_jax.training.checkpoint import saved_steps
        from hope_jax.training.load import load_run
        run_dir = pathlib.Path({str(run_dir)!r})
        if not {foreseen}:
            usage = shutil.disk_usage(run_dir)
            shutil.disk_usage = lambda path: usage
        words = "model=transformer model.dim=64 model.layers=1 model.max_length=64 batch_size=2 seq_len=16 steps=40"
        saving = "checkpoint_every=1 keep_checkpoints=100 eval_every=50 final_eval_batches=1 sample_bytes=0"
        status = main(["train", "smoke", *words.split(), *saving.split(), "data={text_file}", "--run", str(run_dir)])
        print("steps", *saved_steps(run_dir))
        print("names", *sorted((path.name for path in (run_dir / "ckpt").iterdir()), key=int))
        print("loaded", int(load_run(run_dir).state.step))
        sys.exit(status)
    """)
    mount = f"mkdir {run_dir}; mount -t tmpfs -o size=12m tmpfs {run_dir}; exec {sys.executable} -"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mount], input=script, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 1
    ours = [line for line in done.stderr.splitlines() if line.startswith("hope: ")]
    assert ours == done.stderr.splitlines()[-1:]  # what writes the arrays may complain of the failed save before it
    assert ("no room to save" if foreseen else "(the disk is full)") in done.stderr
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines()[-3:])
    assert said["steps"] == said["names"] and said["loaded"] == said["steps"].split()[-1]
    assert f"the checkpoint of step {said['loaded']} is whole; free some space" in done.stderr
