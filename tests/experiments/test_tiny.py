"""Every experiment's tiny mode runs, with one model, and leaves records the report can read."""

import dataclasses
import importlib
from pathlib import Path

import pytest
from rich.console import Console

from experiments import records
from experiments.options import cells
from experiments.running import run
from experiments.training import in_bits

# Hope where it is quickest to compile; the others learn nothing about it here.
TINY = {"formal_languages": ("transformer",), "mqar": ("delta_net",), "mad": ("transformer",), "niah": ("transformer",)}
TINY |= {"babilong": ("delta_net",), "ablation": ("hope",), "context_use": ("transformer",)}
TINY |= {"matryoshka": ("transformer",)}
TINY |= {"domain_stream": ("transformer",), "languages": ("transformer",), "translation": ("transformer",)}
TINY |= {"optimizer_lm": ("transformer",), "optimizer_vision": ("vit",)}
TINY |= {"test_time_learning": ("hope_attention",), "chunk_transfer": ("dla",)}
TINY |= {"levels_and_frequency": ("hope_attention",)}
TINY |= {"class_incremental": ("hope_attention",)}
NO_RECORDS = {
    "optimizer_toy",
    "continual_momentum",
    "session_cost",
    "surprise_gates",
    "consolidation",
    "two_timescales",
    "low_pass",
    "progressive_stacking",
}  # tables and pictures at once; tested in their own files


SLOW = {"ablation", "test_time_learning", "chunk_transfer", "levels_and_frequency"}  # to compile


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in TINY])
def test_tiny(name, tmp_path):
    module = importlib.import_module(f"experiments.{name}")
    options = dataclasses.replace(module.TINY, models=TINY[name], results=tmp_path)
    run(name, options, module.prepare, Console(quiet=True))
    found = list(records.read_all(tmp_path))
    assert len(found) == len(list(cells(options))) > 0
    for record in found:
        assert record.failed is None and record.steps == options.steps
        assert all(0 <= score <= 1 or in_bits(name) for name, score in record.scores.items()) and record.scores
        assert f"experiments.{name}" in record.command


def test_every_experiment_is_here():
    """A file with tiny defaults is an experiment, and runs above."""
    folder = Path(__file__).parents[2] / "experiments"
    assert set(TINY) | NO_RECORDS == {path.stem for path in folder.glob("*.py") if "\nTINY = " in path.read_text()}
