"""Levels started together and one after another: the tiny run, and whose numbers the curves are."""

import dataclasses
import json

import numpy as np
import pytest
from rich.console import Console

from experiments.comparisons import read_comparisons
from experiments.progressive_stacking import TINY, StackingOptions, curves, run
from hope_jax.training.errors import UserError
from hope_jax.training.load import load_run


def record(step, *levels):
    ratios = {f"level_{i}/gradient_ratio": ratio for i, (ratio, _) in enumerate(levels)}
    return {"step": step, **ratios, **{f"level_{i}/update_norm": norm for i, (_, norm) in enumerate(levels)}}


def test_curves_go_by_the_number_at_the_end(tmp_path):
    """Level 0 of the first run is level 1 of the second."""
    stages = {"a": [record(1, (0.5, 1.0)), record(2, (0.25, 2.0))], "b": [record(1, (0.75, 4.0), (0.125, 0.0))]}
    for name, records in stages.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    fast, slow = curves([tmp_path / "a", tmp_path / "b"], 2)
    np.testing.assert_array_equal(slow, [[1, 2, 3], [0.5, 0.25, 0.125], [1, 3, 3]])
    np.testing.assert_array_equal(fast, [[3], [0.75], [4]])


@pytest.mark.slow
def test_tiny(tmp_path):
    options = dataclasses.replace(TINY, runs=tmp_path / "runs", out=tmp_path, results=tmp_path / "numbers.json")
    path, [results] = run(options, Console(quiet=True))
    assert path.exists() and set(results) == {"cold", "progressive"}
    cold, last = (load_run(options.runs / "seed_0" / name) for name in ("cold", "stage_2"))
    assert last.config.model == cold.config.model and last.config.cms_periods == cold.config.cms_periods == (1, 2)
    for way, begins in (("cold", 1), ("progressive", 5)):
        fast, slow = results[way].levels
        np.testing.assert_array_equal(fast.steps, np.arange(begins, 9))
        np.testing.assert_array_equal(slow.steps, np.arange(1, 9))
        [written] = read_comparisons(tmp_path)
        assert written.values[way] == {"bits per byte": [results[way].bits_per_byte]}
        assert written.values[f"{way}, level_1, clock 2"]["movement"] == [results[way].levels[1].movement[-1]]
        assert np.all(fast.gradient > 0) and np.all(slow.gradient > 0) and slow.movement[-1] > 0


def test_stages_of_equal_length():
    with pytest.raises(UserError, match="steps=641 are not 4 stages of equal length; give a multiple of 4"):
        StackingOptions(steps=641)
