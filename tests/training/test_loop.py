"""A run: what it leaves behind, that it continues bit for bit, and how it stops."""

import dataclasses
import json
import signal

import jax
import numpy as np
import optax
import pytest

from hope_jax.training.checkpoint import saved_steps
from hope_jax.training.config import MeshConfig, read_config, write_config
from hope_jax.training.data import TrainBatches
from hope_jax.training.errors import RunFailed, UserError
from hope_jax.training.evaluate import evaluate
from hope_jax.training.load import load_run
from hope_jax.training.loop import train
from tests.training.conftest import records


def assert_same_state(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def interrupt_at(monkeypatch, at):
    """A Ctrl-C while the batch of a step is made."""
    make = TrainBatches.rows

    def make_and_interrupt(self, step, which):
        if step == at:
            signal.raise_signal(signal.SIGINT)
        return make(self, step, which)

    monkeypatch.setattr(TrainBatches, "rows", make_and_interrupt)


def test_run_directory(whole):
    names = {path.name.partition(".tfevents")[0] for path in whole.run_dir.iterdir()}
    assert names == {"config.yaml", "corpus.json", "metrics.jsonl", "events.out", "goodput.json", "loss.png", "ckpt"}
    assert sorted(path.name for path in (whole.run_dir / "ckpt").iterdir()) == ["4", "6"]  # the two latest
    assert (whole.run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(whole.run_dir.rglob("*.pkl"))


def test_config_of_a_run_names_its_schedule(whole, small):
    assert read_config(whole.run_dir) == dataclasses.replace(small, decay_steps=6)


def test_checkpoint_holds_state_and_position(whole):
    meta = json.loads((whole.run_dir / "ckpt" / "6" / "meta" / "metadata").read_text())
    assert meta["data_step"] == 6 and meta["seed"] == 0 and len(meta["corpus_sha256"]) == 64
    run = load_run(whole.run_dir)
    assert int(run.state.step) == 6
    assert_same_state(run.state, whole.state)


@pytest.mark.parametrize("at", [0, 2, 3])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(whole, small, tmp_path, monkeypatch, at):
    with monkeypatch.context() as patch:
        interrupt_at(patch, at)
        first = train(small, tmp_path / "run")
    assert first.interrupted and int(first.state.step) == at + 1
    second = train(small, tmp_path / "run", resume=True)
    assert not second.interrupted and second.started_at == at + 1
    assert_same_state(second.state, whole.state)
    assert records(second.run_dir) == records(whole.run_dir)


@pytest.mark.parametrize(("nth", "step"), [(0, 3), (1, 6)])
def test_ctrl_c_during_an_evaluation_is_honoured(whole, small, tmp_path, monkeypatch, nth, step):
    """The evaluation at step 3, or the one at the end: the run is interrupted, and continues to the same records."""
    calls = []

    def evaluate_and_interrupt(*args, **options):
        if len(calls) == nth:
            signal.raise_signal(signal.SIGINT)
        calls.append(args)
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("hope_jax.training.loop.evaluate", evaluate_and_interrupt)
        first = train(small, tmp_path / "run")
    assert first.interrupted and int(first.state.step) == step
    second = train(small, tmp_path / "run", resume=True)
    assert not second.interrupted
    assert_same_state(second.state, whole.state)
    assert records(second.run_dir) == records(whole.run_dir)


def test_ctrl_c_in_the_last_step_leaves_the_evaluation_to_the_continuation(whole, small, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        first = train(small, tmp_path / "run")
    assert first.interrupted and first.validation_bpb is None
    assert capfd.readouterr().err.count("finishing this step") == 1
    train(small, tmp_path / "run", resume=True)
    assert records(tmp_path / "run") == records(whole.run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hope", "hope_attention"])
def test_gradients_that_wait_for_a_slow_level_survive_a_resume(small, tmp_path, monkeypatch, name):
    """Interrupted between two writes of a level, on a mesh, with accumulation; continued on the same mesh."""
    model = dataclasses.replace(small.model, name=name, memory_hidden=8, cms_hidden=(16, 16), momentum=None)
    config = dataclasses.replace(
        small, model=model, cms_periods=(1, 4), accumulate=2, mesh=MeshConfig(data=2), final_eval_batches=1
    )
    whole = train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        first = train(config, tmp_path / "run")
    assert int(first.state.step) == 2
    pending = optax.tree.get(first.state.opt_state, "pending")
    assert any(np.any(leaf) for leaf in jax.tree.leaves(pending))
    second = train(config, tmp_path / "run", resume=True)
    assert_same_state(second.state, whole.state)
    assert records(second.run_dir) == records(whole.run_dir)


def test_steps_after_the_last_checkpoint_are_repeated_not_lost(whole, small, tmp_path, monkeypatch):
    """A run that dies without a word continues from its checkpoint, and its records are in order."""

    def die(self, step, which):
        if step == 5:
            raise KeyboardInterrupt
        return make(self, step, which)

    make = TrainBatches.rows
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainBatches, "rows", die)
        train(small, tmp_path / "run")
    second = train(small, tmp_path / "run", resume=True)
    assert second.started_at == 4
    assert_same_state(second.state, whole.state)
    assert records(second.run_dir) == records(whole.run_dir)


def test_an_evaluation_in_which_the_run_died_is_made_up_for(small, tmp_path, monkeypatch):
    """Step 4 is saved and its evaluation is not written down; that of step 2 is, and is not repeated."""
    config = dataclasses.replace(small, eval_every=2)
    whole = train(config, tmp_path / "whole")
    calls = []

    def die(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("hope_jax.training.loop.evaluate", die)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run")
        second = train(config, tmp_path / "run", resume=True)
    assert second.started_at == 4 and len(calls) == 4  # steps 2, 4, 4 again, 6
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    assert_same_state(second.state, whole.state)


@pytest.mark.parametrize("resume", [None, False])
def test_a_launcher_sees_progress_however_early_the_kills_come(whole, small, tmp_path, monkeypatch, resume):
    """Each process dies in its second step, long before a save is due."""
    config = dataclasses.replace(small, checkpoint_every=100, keep_checkpoints=2)
    make, calls, reached = TrainBatches.rows, [], []

    def die(self, step, which):
        calls.append(step)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return make(self, step, which)

    for _ in range(4):
        calls.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(TrainBatches, "rows", die)
            train(config, tmp_path / "run", resume=resume if resume is None or not reached else True)
        reached.append(saved_steps(tmp_path / "run"))
    assert reached == ([[1], [1, 2], [2, 3], [3, 4]] if resume is None else 4 * [[]])
    last = train(config, tmp_path / "run", resume=resume or None)
    assert_same_state(last.state, whole.state)


def test_longer_run_keeps_the_schedule(small, tmp_path):
    train(dataclasses.replace(small, steps=3), tmp_path / "run")
    longer = train(dataclasses.replace(small, steps=4), tmp_path / "run", resume=True)
    rates = [record["learning_rate"] for record in records(longer.run_dir) if "loss" in record]
    assert rates[:2] != rates[2:]
    assert rates[3] == pytest.approx(small.final_learning_rate, rel=1e-5)


def test_finished_run_has_nothing_left_to_do(whole, small):
    before = records(whole.run_dir)
    again = train(small, whole.run_dir, resume=True)
    assert again.started_at == 6 and again.validation_bpb == whole.validation_bpb
    assert again.tokens_per_second is not None
    assert records(whole.run_dir) == before
    files = [whole.run_dir / "config.yaml", whole.run_dir / "corpus.json"]
    contents = [path.read_bytes() for path in files]
    with pytest.raises(UserError, match="step 6, beyond steps=5"):
        train(dataclasses.replace(small, steps=5, eval_every=1), whole.run_dir, resume=True)
    assert [path.read_bytes() for path in files] == contents


def test_run_directory_of_another_config_is_refused(whole, small):
    other = dataclasses.replace(small, seed=1)
    with pytest.raises(UserError, match=r"another config \(seed: 0 there, 1 here\); .*--run DIR") as caught:
        train(other, whole.run_dir, resume=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"another config \(seed: 0 there, 1 here\); .*--overwrite"):
        train(other, whole.run_dir)
    with pytest.raises(UserError, match="continue it with --resume"):
        train(small, whole.run_dir)


def test_resume_without_a_run_and_with_other_text(small, trained, tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        train(small, tmp_path / "none", resume=True)
    changed = tmp_path / "text.txt"
    changed.write_text("some text. " * 400)
    config = dataclasses.replace(small, data=str(changed), steps=1)
    train(config, tmp_path / "run")
    changed.write_text("other text. " * 400)
    with pytest.raises(UserError, match="has changed since it was trained on"):
        train(dataclasses.replace(config, steps=2), tmp_path / "run", resume=True)


def test_overwrite_removes_the_run_and_nothing_else(small, tmp_path):
    run_dir = tmp_path / "run"
    train(dataclasses.replace(small, steps=2), run_dir)
    (run_dir / "notes.txt").write_text("mine")
    train(dataclasses.replace(small, steps=1, seed=5), run_dir, overwrite=True)
    assert (run_dir / "notes.txt").read_text() == "mine"
    assert [path.name for path in (run_dir / "ckpt").iterdir()] == ["1"]
    assert len(list(run_dir.glob("events.*"))) == 1


def test_a_bad_model_or_text_leaves_no_directory(small, tmp_path):
    with pytest.raises(UserError):
        train(dataclasses.replace(small, data=str(tmp_path / "none.txt")), tmp_path / "run")
    with pytest.raises(UserError):
        train(dataclasses.replace(small, batch_size=64, mesh=MeshConfig(data=64)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("steps", [1, 6])
def test_parameters_that_diverge_stop_the_run(small, tmp_path, steps):
    wild = dataclasses.replace(small, steps=steps, learning_rate=1e30, final_learning_rate=1e30, warmup_steps=0)
    with pytest.raises(RunFailed, match=r"^step (\d+) gave loss") as caught:
        train(wild, tmp_path / "run")
    message = str(caught.value)
    assert "smaller learning_rate (now 1e+30)" in message and "\n" not in message
    failed = int(message.split()[1])
    assert failed == 1  # the loss of step 1 is of the parameters before it
    assert all(np.isfinite(record["loss"]) for record in records(tmp_path / "run") if "loss" in record)
    assert "no checkpoint was saved" in message and not list((tmp_path / "run" / "ckpt").iterdir())


def test_last_good_checkpoint_is_named(small, tmp_path, monkeypatch):
    """The loss of step 6 is spoiled on its way to the host; step 4 is saved."""
    import hope_jax.training.loop as loop

    make = loop.build_program

    def spoiled(config):
        program = make(config)

        def train_step(state, tokens):
            bad = int(state.step) == 5
            state, metrics = program.train_step(state, tokens)
            return state, metrics._replace(loss=metrics.loss * np.nan) if bad else metrics

        return program._replace(train_step=train_step)

    monkeypatch.setattr(loop, "build_program", spoiled)
    with pytest.raises(RunFailed, match=r"step 6 gave loss nan.*last good checkpoint is step 4 in .*ckpt/4;"):
        train(small, tmp_path / "run")


def test_reading_a_run_leaves_a_save_in_progress_alone(small, tmp_path):
    train(dataclasses.replace(small, steps=1), tmp_path / "run")
    saving = tmp_path / "run" / "ckpt" / "2.orbax-checkpoint-tmp"
    (saving / "state").mkdir(parents=True)
    assert int(load_run(tmp_path / "run").state.step) == 1
    assert (saving / "state").is_dir()


def test_a_run_without_a_checkpoint_cannot_be_read(small, tmp_path):
    write_config(small, tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        load_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("read", [load_run, None], ids=["load", "resume"])
def test_checkpoints_of_another_run_are_refused(small, tmp_path, read):
    """An edited config.yaml, checkpoints copied from elsewhere: nothing in their shapes tells."""
    train(dataclasses.replace(small, steps=1), tmp_path / "run")
    changed = dataclasses.replace(small, decay_steps=1, seed=3, weight_decay=0)  # 0 is what YAML reads as 0.0
    write_config(changed, tmp_path / "run")
    with pytest.raises(UserError, match=r"saved by another run \(seed: 0 there, 3 here; config_hash: ") as caught:
        load_run(tmp_path / "run") if read else train(changed, tmp_path / "run", resume=True)
    assert "corpus" not in str(caught.value).partition(";")[0]


def test_checkpoints_without_a_config_are_not_written_over(small, tmp_path):
    train(dataclasses.replace(small, steps=1), tmp_path / "run")
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"holds checkpoints but no config\.yaml"):
        train(small, tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_run_on_a_mesh_is_loaded_on_one_device(small, tmp_path):
    config = dataclasses.replace(small, steps=1, mesh=MeshConfig(data=2, fsdp=2))
    result = train(config, tmp_path / "run")
    assert len(result.state.step.sharding.device_set) == 4
    run = load_run(tmp_path / "run")
    assert len(run.state.step.sharding.device_set) == 1
    assert_same_state(run.state.params, result.state.params)
