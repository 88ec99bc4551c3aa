"""What a report says of levels whose gradients are not all known."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from hope_jax.online.chat import learned
from hope_jax.online.reading import report_json
from hope_jax.online.report import join, summarize

# What a level does in a chunk: fired, step, gradient.
WAITS, WENT_ON, WEAKLY = (False, 0.0, np.nan), (True, 0.5, 2.0), (True, 0.5, 1e-4)
AGAIN, NOTHING_TAUGHT = (True, 0.1, np.nan), (True, 0.0, np.nan)


def reported(fast, slow):
    """A report of chunks in which two levels did this."""
    by_level = (np.array(found, np.float32)[..., None] for found in (fast, slow))
    fired, step, gradient = np.moveaxis(np.concatenate(list(by_level), axis=-1), 1, 0)
    count = len(fired)
    chunks = join([], 4, 2)._replace(
        losses=np.ones((count, 4), np.float32),
        before=np.ones(count, np.float32),
        after=np.ones(count, np.float32),
        wrote=np.ones(count, bool),
        rolled_back=np.zeros(count, bool),
        fired=fired.astype(bool),
        step=step,
        gradient=gradient,
        moved=step,
    )
    return summarize(chunks, tokens=4 * count, held=0, written=0, clocks=(4, 8), new_contexts=0)


@pytest.mark.parametrize(
    ("fast", "expected"),
    [
        ((AGAIN,), np.nan),
        ((WENT_ON, AGAIN), 2.0),
        ((AGAIN, WENT_ON), 2.0),
        ((WAITS,), 0.0),
        ((NOTHING_TAUGHT,), 0.0),
    ],
)
def test_a_gradient_that_is_not_known_is_nan(fast, expected):
    """And says nothing about who learns, in whichever order the levels come."""
    for does in (WENT_ON, WEAKLY):
        slow = (*[WAITS] * (len(fast) - 1), does)
        report, turned = reported(fast, slow), reported(slow, fast)
        for level, other in (report.levels, turned.levels[::-1]):
            np.testing.assert_equal(level.gradient, expected)
            assert level.dead == (fast == (NOTHING_TAUGHT,))
            assert other.dead == (does == WEAKLY and WENT_ON in fast)

        sent = json.loads(json.dumps(report_json(report), allow_nan=False))
        assert sent["levels"][0]["gradient"] == (None if np.isnan(expected) else expected)
        out = io.StringIO()
        Console(file=out, width=200).print(learned(report))
        assert "nan" not in f"{out.getvalue()} {report}".lower()
