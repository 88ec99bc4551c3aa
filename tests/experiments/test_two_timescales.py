"""The drifting line: the nest is the loop, and the numbers of its docstring."""

import dataclasses

import numpy as np
import pytest
from rich.console import Console

from experiments import two_timescales
from experiments.options import from_command_line
from experiments.two_timescales import WAYS, TimescaleOptions, learn, loop, stream, summary
from hope_jax.training.errors import UserError

QUIET = Console(quiet=True)


@pytest.mark.parametrize("way", WAYS)
def test_the_nest_is_the_loop(way, x64):
    streams = [stream(200, seed) for seed in (0, 1)]
    x, y = map(np.stack, zip(*streams, strict=True))
    found = learn(WAYS[way], x, y)
    for got, want in zip(zip(*found, strict=True), (loop(WAYS[way], *one) for one in streams), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)


def test_a_slow_clock_waits(x64):
    """Within a chunk of the slope only the bias moves, and then the slope by all of the chunk's errors."""
    x, y = stream(12, 0)
    (errors,), (slopes,) = learn(WAYS["nested"], x[None], y[None], slow_chunk=4)
    assert (slopes.reshape(3, 4) == slopes[::4, None]).all()
    np.testing.assert_allclose(slopes[4] - slopes[0], 0.05 * (errors[:4] * x[:4]).sum(), atol=1e-12)


def test_two_clocks_beat_one(tmp_path):
    """Spec 11.3 and 10.49: 1.35 against 3.23, 0.20 against 0.49, within 0.02, and so for every seed."""
    path, found = two_timescales.run(TimescaleOptions(out=tmp_path), QUIET)
    assert path.read_bytes().startswith(b"\x89PNG")
    nested, single = map(summary, found.values())
    for one, two, (expected_one, expected_two) in zip(nested, single, ((1.35, 3.23), (0.20, 0.49)), strict=True):
        assert one.shape == (100,) and (one < two).all()
        assert one.mean() == pytest.approx(expected_one, abs=0.02)
        assert two.mean() == pytest.approx(expected_two, abs=0.02)


def test_command_line(tmp_path):
    tiny = from_command_line(TimescaleOptions, two_timescales.TINY, ["--tiny"])
    assert tiny == dataclasses.replace(two_timescales.TINY, tiny=True)
    assert two_timescales.run(dataclasses.replace(tiny, out=tmp_path), QUIET)[0].exists()
    with pytest.raises(UserError, match="steps must be at least 2; got 1"):
        TimescaleOptions(steps=1)
