"""What a run writes down of itself: records, their copies, traces, and the lines on the terminal."""

import dataclasses
import sys
import time
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from hope_jax.training.errors import UserError
from hope_jax.training.goodput import read_goodput
from hope_jax.training.loop import train
from hope_jax.training.metrics import TIMED, MetricsWriter, read_metrics
from hope_jax.training.profile import Steps
from hope_jax.training.progress import Display
from hope_jax.training.run_dir import remove_run
from hope_jax.training.utilisation import model_flops
from tests.training.conftest import records


def test_records(whole, small):
    training = [record for record in records(whole.run_dir) if "loss" in record]
    assert [record["step"] for record in training] == [1, 2, 3, 4, 5, 6]
    keys = {"step", "loss", "bits_per_byte", "grad_norm", "update_norm", "params_norm", "learning_rate"}
    keys |= {"rest/update_norm", "rest/steps_since_update", "rest/gradient_ratio"}
    assert all(set(record) == keys for record in training)
    assert training[0]["bits_per_byte"] == pytest.approx(8, rel=0.1)  # nothing is known yet
    evaluations = {r["step"]: r["validation_bits_per_byte"] for r in records(whole.run_dir) if "loss" not in r}
    assert set(evaluations) == {3, 6}
    assert evaluations[6] == whole.validation_bpb < evaluations[3]


def test_the_machine_is_in_the_records_and_the_time_in_the_categories(whole):
    records = read_metrics(whole.run_dir)
    training = [record for record in records if "loss" in record]
    assert TIMED - set().union(*training) == {"mfu", "device_memory_bytes"}  # unknown on a CPU
    assert all(np.diff([record["seconds"] for record in records]) > 0)
    evaluations = [record for record in records if "loss" not in record]
    assert all(record["rest/distance"] > 0 and record["seconds"] > 0 for record in evaluations)
    (found,) = read_goodput(whole.run_dir)
    assert found.finished and (found.first_step, found.last_step) == (0, 6)
    assert all(found.seconds[name] > 0 for name in ("step", "compile", "eval", "save", "other"))
    assert sum(found.seconds.values()) == pytest.approx(found.until - found.began, rel=0.01)


def test_the_mfu_where_the_peak_is_known(small, tmp_path):
    """A peak that makes the numbers readable: the share is the least time over the median time."""
    config = dataclasses.replace(
        small, steps=4, eval_every=9, checkpoint_every=9, final_eval_batches=1, peak_flops=1e12
    )
    train(config, tmp_path / "run")
    last = [record for record in read_metrics(tmp_path / "run") if "mfu" in record][-1]
    assert last["mfu"] * last["step_seconds"] == pytest.approx(model_flops(config).products / 1e12)
    recomputed = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))
    assert model_flops(recomputed) == model_flops(config)
    assert model_flops(dataclasses.replace(config, accumulate=2)).products == model_flops(config).products


def test_a_trace_of_two_steps(small, tmp_path):
    config = dataclasses.replace(small, steps=3, final_eval_batches=1)
    train(config, tmp_path / "run", profile=Steps(2, 3))
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    with pytest.raises(UserError, match=r"takes steps 4 to 5; for example --profile 4:5"):
        train(dataclasses.replace(config, steps=5), tmp_path / "run", resume=True, profile=Steps(3, 4))
    with pytest.raises(UserError, match="at step 3 already; give a larger steps"):
        train(config, tmp_path / "run", resume=True, profile=Steps(3, 3))
    remove_run(tmp_path / "run")
    assert not (tmp_path / "run" / "profile").exists()


def fake_wandb(init) -> ModuleType:
    """A module in its place: the package is not a dependency."""
    fake = ModuleType("wandb")
    fake.__spec__ = ModuleSpec("wandb", None)
    fake.init = init  # type: ignore[attr-defined]
    return fake


def test_weights_and_biases_gets_the_records_too(small, tmp_path, monkeypatch):
    begun, logged = [], []
    run = SimpleNamespace(log=lambda values, step: logged.append({"step": step, **values}), finish=lambda: None)
    fake = fake_wandb(lambda **options: begun.append(options) or run)
    config = dataclasses.replace(small, steps=2, wandb="nested")
    with pytest.raises(UserError, match=r"wandb=nested needs the package wandb, .*pip install"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(config, tmp_path / "run")
    assert logged == read_metrics(tmp_path / "run")
    train(dataclasses.replace(config, steps=3), tmp_path / "run", resume=True)
    assert [options["id"] for options in begun] == 2 * [begun[0]["id"]]
    assert begun[0]["project"] == "nested" and begun[0]["config"]["steps"] == 2


def test_weights_and_biases_that_refuses(small, tmp_path, monkeypatch, capsys):
    """A run does not begin without what it asked for, and one that goes on does not end for it."""

    def refuse(**_):
        raise RuntimeError("api_key not configured\n(no-tty)")

    config = dataclasses.replace(small, steps=1, wandb="nested", final_eval_batches=1)
    train(dataclasses.replace(config, wandb=""), tmp_path / "run")
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(refuse))
    said = r"wandb=nested could not begin \(api_key not configured \(no-tty\)\); .*wandb login.*WANDB_MODE=offline"
    with pytest.raises(UserError, match=said) as caught:
        train(config, tmp_path / "other")
    assert "\n" not in str(caught.value)
    again = train(dataclasses.replace(config, steps=2), tmp_path / "run", resume=True)
    assert int(again.state.step) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "wandb" in line)
    assert line.startswith(f"hope: warning: {caught.value}") and line.endswith("the run goes on without it")


RECORD = {"loss": 1.0, "bits_per_byte": 1.443, "tokens_per_second": 12_345.6}


def test_display_says_the_numbers_without_a_terminal():
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file, Display(console, "hope", steps=100) as display:
        for step in range(1, 101):
            display.update(step, {**RECORD, "mfu": 0.1234})
            time.sleep(0)
    lines = console.export_text().splitlines()
    assert len(lines) == 20
    assert lines[-1] == "hope step 100/100  loss 1.000  1.443 bits/byte  12,346 tokens/s  MFU 12.3%"


def test_display_on_a_terminal_shows_what_is_left():
    console = Console(record=True, width=160, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file, Display(console, "hope", steps=100) as display:
        display.update(40, RECORD)
        display._progress.refresh()
    shown = console.export_text()
    assert "40/100" in shown and "1.443 bits/byte" in shown and "left" in shown


def test_records_cut_short_by_a_crash_are_dropped(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, loss=2.0)
        writer.write(2, loss=1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "lo')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    with MetricsWriter(tmp_path, resume_step=1) as writer:
        writer.write(2, loss=1.5)
    assert [record["loss"] for record in read_metrics(tmp_path)] == [2.0, 1.5]
