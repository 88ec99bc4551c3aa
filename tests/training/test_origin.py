"""Runs that begin from another run: what is carried, what starts anew, and that they need the other no more."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest

from hope_jax import reset_momentum
from hope_jax.cli import main
from hope_jax.models import ModelConfig
from hope_jax.training.checkpoint import Checkpoints
from hope_jax.training.config import MeshConfig, StartConfig, TrainConfig, config_hash, write_config
from hope_jax.training.errors import UserError
from hope_jax.training.evaluate import evaluate
from hope_jax.training.interrupt import Stop
from hope_jax.training.load import load_run
from hope_jax.training.loop import train
from hope_jax.training.metrics import read_metrics
from hope_jax.training.optimizer import build_optimizer
from hope_jax.training.origin import begin, config_from, find_origin
from hope_jax.training.step import build_program
from tests.training import processes
from tests.training.test_loop import assert_same_state, interrupt_at, records

MODEL = ModelConfig(name="hope_attention", dim=16, layers=1, heads=2, cms_hidden=(8, 12), max_length=64)


@pytest.fixture(scope="module")
def base(small) -> TrainConfig:
    return dataclasses.replace(small, model=MODEL, cms_periods=(1, 2), steps=3, eval_every=2, checkpoint_every=2)


@pytest.fixture(scope="module")
def first(base, tmp_path_factory):
    """A run of three steps: its slow level has gathered the gradient of one."""
    return train(base, tmp_path_factory.mktemp("first") / "run")


@pytest.fixture(scope="module")
def other_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("other") / "other.txt"
    path.write_text("".join(f"NUMBER {i}, TWICE {2 * i}.\n" for i in range(500)))
    return path


def state_of(config, run_dir, mesh=None):
    """The state that a run of this config would begin with, and its program."""
    run_dir.mkdir()
    config = dataclasses.replace(config, mesh=mesh or config.mesh)
    program = build_program(config)
    origin = find_origin(config, program, run_dir)
    assert origin is not None
    return begin(origin, config, program, run_dir), program


def adams(opt_state):
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731
    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(node)]


def counts_of_schedules(opt_state):
    is_one = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
    return [int(node.count) for node in jax.tree.leaves(opt_state, is_leaf=is_one) if is_one(node)]


def without_schedules(opt_state):
    is_one = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
    return jax.tree.map(lambda node: () if is_one(node) else node, opt_state, is_leaf=is_one)


def test_momenta_go_on(first, tmp_path):
    """Everything of the optimizer to the bit, gathered gradients and clocks too, but for the schedule."""
    state, _ = state_of(config_from(first.run_dir), tmp_path / "run")
    assert int(state.step) == 0
    assert_same_state(state.params, first.state.params)
    assert_same_state(without_schedules(state.opt_state), without_schedules(first.state.opt_state))
    assert counts_of_schedules(first.state.opt_state) == [3, 1] and counts_of_schedules(state.opt_state) == [0, 0]
    assert np.any(adams(state.opt_state)[0].mu["embedding"])


def test_momenta_start_again(first, tmp_path):
    """As `reset_momentum` says, and the schedule anew."""
    config = dataclasses.replace(config_from(first.run_dir), start=StartConfig(str(first.run_dir), "reset"))
    state, _ = state_of(config, tmp_path / "run")
    assert_same_state(state.params, first.state.params)
    expected = reset_momentum(build_optimizer(config), first.state.opt_state, state.params)
    assert_same_state(without_schedules(state.opt_state), without_schedules(expected))
    assert counts_of_schedules(state.opt_state) == [0, 0]
    assert not any(np.any(leaf) for adam in adams(state.opt_state) for leaf in jax.tree.leaves(adam))


def test_on_another_mesh(first, tmp_path):
    state, program = state_of(config_from(first.run_dir), tmp_path / "run", MeshConfig(fsdp=2))
    assert_same_state(state.params, first.state.params)
    assert_same_state(without_schedules(state.opt_state), without_schedules(first.state.opt_state))
    jax.tree.map(lambda leaf, like: leaf.sharding == like.sharding or pytest.fail(), state, program.abstract_state)


@pytest.fixture(scope="module")
def second(first, other_text, tmp_path_factory):
    """Four steps on another text, after the first run."""
    config = dataclasses.replace(config_from(first.run_dir), data=str(other_text), steps=4)
    return train(config, tmp_path_factory.mktemp("second") / "run")


def test_what_the_new_run_keeps(first, second, base):
    facts = json.loads((second.run_dir / "origin.json").read_text())
    assert facts["run"] == str(first.run_dir) and facts["step"] == 3 and facts["momentum"] == "carry"
    assert facts["config_hash"] == config_hash(dataclasses.replace(base, decay_steps=3))
    assert sorted(path.name for path in (second.run_dir / "ckpt").iterdir()) == ["0", "2", "4"]
    with Checkpoints(second.run_dir, read_only=True) as checkpoints:
        start = checkpoints.beginning(second.program.abstract_state.params)
    assert_same_state(start, first.state.params)
    rates = [record["learning_rate"] for record in records(second.run_dir) if "loss" in record]
    assert rates[0] == pytest.approx(second.config.learning_rate / 3) and len(rates) == 4  # two steps of warm-up
    moved = [record["rest/distance"] for record in records(second.run_dir) if "rest/distance" in record]
    difference = jax.tree.map(lambda a, b: a - b, second.state.params, first.state.params)
    del difference["blocks"]["cms"]
    assert moved[-1] == pytest.approx(float(optax.tree.norm(difference)), rel=1e-5)


def test_it_is_resumed_to_the_bit_without_the_first_run(first, second, tmp_path, monkeypatch):
    """From the step it was interrupted at, and from step 0 when it has no other checkpoint."""
    shutil.copytree(first.run_dir, tmp_path / "first")
    config = dataclasses.replace(second.config, start=StartConfig(str(tmp_path / "first")))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        interrupted = train(config, tmp_path / "run")
    assert interrupted.stop == Stop.INTERRUPTED and 0 < int(interrupted.state.step) < 4
    shutil.rmtree(tmp_path / "first")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for path in (tmp_path / "again" / "ckpt").iterdir():
        if path.name != "0":
            shutil.rmtree(path)
    for run, step in (("run", int(interrupted.state.step)), ("again", 0)):
        resumed = train(config, tmp_path / run, resume=True)
        assert resumed.started_at == step
        assert_same_state(resumed.state, second.state)
        assert records(resumed.run_dir) == records(second.run_dir)


def test_a_level_in_front(first, base, tmp_path):
    """The function and the moments of what was there stay to the bit; each level is written 4 times more rarely."""
    config = config_from(first.run_dir, add_level=True)
    assert config.model.cms_hidden == (8, 8, 12) and config.cms_periods == (1, 4, 8)
    state, program = state_of(config, tmp_path / "run")
    validation = first.corpus.validation
    assert evaluate(program, state.params, validation, config, 2) == evaluate(
        first.program, first.state.params, validation, base, 2
    )
    before = {path: leaf for adam in adams(first.state.opt_state) for path, leaf in by_path(adam.mu).items()}
    after = {path: leaf for adam in adams(state.opt_state) for path, leaf in by_path(adam.mu).items()}
    levels = {"level_1": "level_0", "level_2": "level_1"}
    for path, moment in after.items():
        name = next((level for level in ("level_0", *levels) if level in path), "")
        if name == "level_0":
            assert not np.any(moment)
        else:
            np.testing.assert_array_equal(moment, before[path.replace(name, levels.get(name, ""))])
    assert [int(adam.count) for adam in adams(state.opt_state)] == [3, 3, 1]  # of every step, every 4th, every 8th
    assert counts_of_schedules(state.opt_state) == [0, 0, 0]


def by_path(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.slow
def test_two_processes_begin_from_a_run_of_one(first, tmp_path, program_cache):
    words = ["--from", str(first.run_dir), "steps=2", "eval_every=1", "--add-level", "sample_bytes=0"]
    options = {"cache": program_cache, "log": tmp_path / "logs"}
    processes.run([*words, "--run", str(tmp_path / "one")], 1, **options)
    printed, _ = processes.run([*words, "mesh.fsdp=2", "--run", str(tmp_path / "two")], 2, **options)
    assert f"begins from {first.run_dir} at step 3, its momenta go on; new and without effect yet: level_0" in printed
    one, two = (
        [value for record in records(tmp_path / name) for key, value in sorted(record.items())]
        for name in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-4)  # float32 sums over other pieces; distances are differences


@pytest.mark.slow
def test_levels_are_added_one_run_after_another(first, tmp_path):
    """And all of a chain of runs can be used like any other run."""
    for number, there in ((1, first.run_dir), (2, tmp_path / "run1")):
        config = dataclasses.replace(config_from(there, add_level=True), steps=2)
        train(config, tmp_path / f"run{number}")
    run = load_run(tmp_path / "run2")
    assert run.config.model.cms_hidden == (8, 8, 8, 12) and run.config.cms_periods == (1, 4, 16, 32)
    told = [record for record in read_metrics(tmp_path / "run2") if "loss" in record]
    assert all(record["level_3/update_norm"] == 0 for record in told)  # due at step 32
    assert all(record["level_0/gradient_ratio"] > 0 for record in told)
    assert json.loads((tmp_path / "run2" / "origin.json").read_text())["new_levels"] == [8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": StartConfig("/nowhere/run")}, "/nowhere/run is not a run directory"),
        ({"model": dataclasses.replace(MODEL, dim=32)}, r"cms/level_0/norm/scale is 1x16 there and 1x32 here"),
        ({"model": dataclasses.replace(MODEL, cms_hidden=(8, 9)), "cms_periods": ()}, r"1x12x16 there and 1x9x16 here"),
        ({"model": dataclasses.replace(MODEL, name="hope")}, r"blocks/mixer/\S+ is 1x16x16 there and missing here"),
    ],
)
def test_what_does_not_fit(first, changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(dataclasses.replace(config_from(first.run_dir), **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_begin_from_itself(first, small, tmp_path):
    with pytest.raises(UserError, match="which it would write over"):
        train(config_from(first.run_dir), first.run_dir, overwrite=True)
    assert load_run(first.run_dir).state.step == 3
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        shutil.copytree(first.run_dir, tmp_path / "bare", ignore=shutil.ignore_patterns("ckpt"))
        train(config_from(tmp_path / "bare"), tmp_path / "run")
    with pytest.raises(UserError, match="has none: take name='hope'"):
        write_config(small, tmp_path)
        config_from(tmp_path, add_level=True)


def test_another_tokenizer_is_refused(first, tmp_path):
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE(vocab={chr(32 + i): i for i in range(90)}, merges=[])).save(str(path))
    config = dataclasses.replace(config_from(first.run_dir), tokenizer=str(path))
    with pytest.raises(UserError, match=r"makes other tokens than those that .* \(tokenizer=bytes\)"):
        find_origin(config, build_program(config), tmp_path / "run")


def test_a_continuation_adds_no_level(first, tmp_path, capsys):
    train(dataclasses.replace(config_from(first.run_dir), steps=1), tmp_path / "run")
    words = ["train", "--from", str(first.run_dir), "--add-level", "--resume", "--run", str(tmp_path / "run")]
    assert main(words) == 2
    assert "began without a new level; leave out --add-level" in capsys.readouterr().err
