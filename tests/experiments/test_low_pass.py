"""What a slow level sees: measured on a nest, against the formula."""

import dataclasses

import numpy as np
import pytest
from rich.console import Console

from experiments import low_pass
from experiments.low_pass import LowPassOptions, half_power, measured, predicted
from experiments.options import from_command_line
from hope_jax.training.errors import UserError

QUIET = Console(quiet=True)
AT = np.array([0.003, 0.02, 0.1, 1 / 16, 0.25, 0.37])


@pytest.mark.parametrize("step", [1.0, 0.5])
def test_levels_are_the_filters_of_the_formula(step):
    options = LowPassOptions(chunks=(4, 16), step=step, writes=24)  # 0.5^24 is left of the empty start
    got = measured(AT, options)
    for number, chunk in enumerate(options.chunks):
        np.testing.assert_allclose(got[:, number], predicted(AT, chunk, step), atol=2e-6)  # 384 float32 sums


def test_the_formula_is_the_length_of_a_mean():
    """Without the closed form: the mean of C unit vectors, then the recurrence of momentum until it settles."""
    for chunk, step in ((4, 1.0), (16, 0.3)):
        held = np.zeros(len(AT), complex)
        for n in range(200):
            means = np.exp(2j * np.pi * AT[:, None] * np.arange(n * chunk, (n + 1) * chunk)).mean(axis=1)
            held = (1 - step) * held + step * means
        np.testing.assert_allclose(np.abs(held), predicted(AT, chunk, step), atol=1e-12)


def test_half_power(tmp_path):
    """Spec 11.2: 0.4553, 0.4437 and 0.4430 over C."""
    path, frequencies, amplitudes = low_pass.run(LowPassOptions(writes=2, out=tmp_path), QUIET)
    assert path.read_bytes().startswith(b"\x89PNG") and amplitudes.shape == (200, 3)
    for chunk, want, found in zip((4, 16, 64), (0.4553, 0.4437, 0.4430), amplitudes.T, strict=True):
        assert half_power(frequencies, found) * chunk == pytest.approx(want, abs=2e-4)
    assert np.isnan(half_power(frequencies, np.ones(200)))


def test_command_line(tmp_path):
    tiny = from_command_line(LowPassOptions, low_pass.TINY, ["--tiny"])
    assert tiny == dataclasses.replace(low_pass.TINY, tiny=True)
    assert low_pass.run(dataclasses.replace(tiny, out=tmp_path), QUIET)[0].exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"chunks": (4, 6)}, r"chunks must divide, fastest first; got \(4, 6\)"), ({"step": 0.0}, "step must lie .* 0.0")],
)
def test_refusals(change, message):
    with pytest.raises(UserError, match=message):
        LowPassOptions(**change)
