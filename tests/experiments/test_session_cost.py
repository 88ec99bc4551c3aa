"""The cost of a session's token: every block is measured and drawn."""

import dataclasses

import numpy as np
import pytest
from rich.console import Console

from experiments import session_cost
from experiments.comparisons import read_comparisons


@pytest.mark.slow
def test_tiny(tmp_path):
    options = dataclasses.replace(session_cost.TINY, out=tmp_path, results=tmp_path / "numbers.json")
    points, picture = session_cost.run(options, Console(quiet=True))
    assert [point.tokens for point in points] == [1024, 2048, 3072, 4096]
    assert all(point.microseconds > 0 and np.isfinite(point.loss) for point in points)
    assert points[-1].file < 2 * points[0].file  # four times the text: it is not in it
    [found] = read_comparisons(tmp_path)
    assert found.values["4,096 tokens"]["us per token"] == [points[-1].microseconds]
    assert picture.stat().st_size > 0
