"""Levels that do not learn are named once, and seen in `hope watch` and `hope plot --levels`."""

import dataclasses
import json

import pytest
from rich.console import Console

from hope_jax.training.config import StartConfig, write_config
from hope_jax.training.errors import UserError
from hope_jax.training.level_health import FRACTION, STEPS, Health, dead_levels, ratios
from hope_jax.training.metrics import METRICS_FILE
from hope_jax.training.plots import plot_runs
from hope_jax.training.watch import watch


def record(step, *ratios):
    levels = {f"level_{i}/gradient_ratio": ratio for i, ratio in enumerate(ratios)}
    norms = {f"level_{i}/{name}": 0.0 for i in range(len(ratios)) for name in ("update_norm", "steps_since_update")}
    return {"step": step, "loss": 2.0, "bits_per_byte": 2.9, "rest/gradient_ratio": 5.0, **norms, **levels}


def test_a_dead_level_is_named_once_after_so_many_steps():
    """One step above the fraction, and the count begins again."""
    health = Health()
    said = []
    for step in range(1, 3 * STEPS):
        quiet = 0.9 * FRACTION if step != STEPS - 1 else 1.1 * FRACTION
        said += [(step, line.partition(":")[2].split()[0]) for line in health.news(record(step, 1.0, quiet, 0.5))]
    assert said == [(2 * STEPS - 1, "level_1")]


def test_one_level_or_none_is_never_dead():
    """The greatest is the measure, and what is no CMS level does not count."""
    assert not dead_levels([ratios(record(step, 0.0)) for step in range(STEPS)])
    health = Health()
    assert not any(health.news(record(step)) for step in range(STEPS))


def test_what_is_shown(small, tmp_path):
    write_config(dataclasses.replace(small, start=StartConfig("runs/before")), tmp_path)
    records = [record(step, 0.25, 1e-4) for step in range(1, STEPS + 1)]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(one) + "\n" for one in records))
    console = Console(record=True, width=120, file=(tmp_path / "out").open("w"))
    with console.file:
        watch(tmp_path, once=True, console=console)
    text = console.export_text()
    (dead,) = [line for line in text.splitlines() if "hardly learns" in line]
    assert "begun from runs/before" in text
    assert "level_1" in dead and "0.0001" in dead and "0.25" in text
    assert plot_runs([tmp_path], tmp_path / "levels.png", levels=True).endswith("1 run over step")
    assert (tmp_path / "levels.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / METRICS_FILE).write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    with pytest.raises(UserError, match="no records of CMS levels' gradients; plot its losses, without --levels"):
        plot_runs([tmp_path], tmp_path / "levels.png", levels=True)
