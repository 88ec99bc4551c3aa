"""What is seen of a run from outside: the dashboard, the pictures, and what both say when there is little to see."""

import json
import shutil
import time

import pytest
from rich.console import Console

from hope_jax.training import watch as watching
from hope_jax.training.config import write_config
from hope_jax.training.errors import UserError
from hope_jax.training.goodput import Incarnation
from hope_jax.training.metrics import METRICS_FILE
from hope_jax.training.plots import plot_runs
from hope_jax.training.run_view import Reader
from hope_jax.training.watch import watch


def line(step, **values):
    record = {
        "step": step,
        "loss": 2.0,
        "bits_per_byte": 3.0 - step / 8,
        "grad_norm": 1.5,
        "update_norm": 0.25,
        "params_norm": 9.0,
        "learning_rate": 1e-3,
        "level_0/update_norm": 0.125,
        "level_0/steps_since_update": 0,
        "level_1/update_norm": 0.0,
        "level_1/steps_since_update": step,
        "tokens_per_second": 12345.6,
        "step_seconds": 0.5,
        "step_seconds_p95": 0.75,
        "mfu": 0.421,
        "seconds": 2.0 * step,
        "device_memory_bytes": 3 * 2**30,
    }
    return json.dumps(record | values) + "\n"


@pytest.fixture
def run_dir(small, tmp_path):
    """A run of six steps in its third, that said so this moment."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    write_config(small, run_dir)
    evaluation = {"step": 3, "validation_bits_per_byte": 2.875, "level_0/distance": 0.75, "level_1/distance": 0.0}
    (run_dir / METRICS_FILE).write_text(line(1) + line(2) + line(3) + json.dumps(evaluation) + "\n")
    live(run_dir)
    return run_dir


def live(run_dir, ago=0.0, doing="step", finished=False):
    now = time.time() - ago
    seconds = {"step": 30.0, "compile": 20.0}
    row = Incarnation(now - 50, now, 0, 3, doing, finished, seconds)
    (run_dir / "goodput.json").write_text(json.dumps([row._asdict()]))


def shown(run_dir):
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        watch(run_dir, once=True, console=console)
    return console.export_text()


def test_a_frame_of_a_running_run(run_dir):
    (run_dir / "ckpt" / "2").mkdir(parents=True)
    text = shown(run_dir)
    for words in (
        "running",
        "transformer, step 3 of 6 (50%), last checkpoint: step 2, about 1.5 s of steps left",
        "2.6250 bits/byte",
        "█▅▁",
        "2.8750 bits/byte",
        "12,346",
        "500.0 ms (p95 750.0 ms)",
        "42.1%",
        "60.0%",
        "3.00 GiB of the fullest device",
        "wall time 50.0 s: step 30.0 s, compile 20.0 s",
    ):
        assert words in text
    level_0, level_1 = (next(row for row in text.splitlines() if name in row) for name in ("level_0", "level_1"))
    assert "in the last step" in level_0 and "0.125" in level_0 and "0.75 at step 3" in level_0
    assert "never" in level_1


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"doing": "ended", "finished": True}, "finished"),
        ({"doing": "ended"}, "stopped before its last step"),
        ({"ago": 300.0}, "stale: nothing new for 5 min 0 s"),
        ({"ago": 300.0, "doing": "compile"}, "compiling, silent for 5 min 0 s"),
        ({"doing": "eval"}, "evaluating"),
    ],
)
def test_what_a_run_is_doing(run_dir, state, words):
    live(run_dir, **state)
    assert words in shown(run_dir)


def test_a_level_that_was_written_some_steps_ago(run_dir):
    with (run_dir / METRICS_FILE).open("a") as file:
        file.write(line(4, **{"level_1/update_norm": 0.5, "level_1/steps_since_update": 0}))
        file.write(line(6, **{"level_1/steps_since_update": 2}))
    row = next(row for row in shown(run_dir).splitlines() if "level_1" in row)
    assert "2 steps ago (1.0 s)" in row and "0.5" in row


def test_a_run_that_has_not_begun(small, tmp_path):
    with pytest.raises(UserError, match=r"holds no run \(yet\).*--run"):
        watch(tmp_path / "none", once=True)
    write_config(small, tmp_path)
    assert "not begun" in shown(tmp_path) and "step 0 of 6" in shown(tmp_path)


def test_a_growing_a_cut_and_a_removed_run(run_dir):
    reader, path = Reader(run_dir), run_dir / METRICS_FILE

    def steps():
        view = reader.view()
        assert view is not None
        return [record["step"] for record in view.records]

    assert steps() == [1, 2, 3, 3]
    with path.open("a") as file:
        file.write(line(4)[:20])
    assert steps() == [1, 2, 3, 3]  # half a line is not there yet
    with path.open("a") as file:
        file.write(line(4)[20:] + line(5))
    assert steps() == [1, 2, 3, 3, 4, 5]
    path.write_text(line(1))  # continued from an earlier checkpoint
    assert steps() == [1]
    shutil.rmtree(run_dir)
    assert reader.view() is None


def test_the_live_view_lasts_until_ctrl_c(run_dir, monkeypatch):
    """It waits for a run that is not there, and shows it when it is."""
    hidden, frames = run_dir.with_name("hidden"), []
    run_dir.rename(hidden)

    def sleep(_):
        frames.append(None)
        if len(frames) == 1:
            hidden.rename(run_dir)
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr(watching.time, "sleep", sleep)
    console = Console(record=True, width=120, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        watch(run_dir, console=console)
    text = console.export_text()
    assert "waiting for one" in text and "step 3 of 6" in text and len(frames) == 2


@pytest.mark.parametrize("x", ["steps", "tokens", "time"])
def test_runs_in_one_picture(run_dir, tmp_path, x):
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    said = plot_runs([run_dir, other], tmp_path / "runs.png", x)
    assert said.startswith(f"wrote {tmp_path / 'runs.png'}: 2 runs over ")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_that_cannot_be_drawn(run_dir, tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        plot_runs([tmp_path], tmp_path / "runs.png")
    with pytest.raises(UserError, match=r"cannot write .*--out runs\.png"):
        plot_runs([run_dir], tmp_path / "none" / "runs.png")
    with pytest.raises(UserError, match=r"cannot write .*--out runs\.png"):
        plot_runs([run_dir], tmp_path / "runs.strange")
    (run_dir / METRICS_FILE).write_text('{"step": 1, "bits_per_byte": 2.0}\n')
    with pytest.raises(UserError, match="before times were recorded; plot it with --x steps"):
        plot_runs([run_dir], tmp_path / "runs.png", "time")
    (run_dir / METRICS_FILE).write_text("")
    with pytest.raises(UserError, match="holds no records yet"):
        plot_runs([run_dir], tmp_path / "runs.png")
