"""Gates between the bounds: every reading is of the same chunks, and the oracle looks ahead."""

import dataclasses
import json

import numpy as np
import pytest
from rich.console import Console

from experiments import surprise_gates
from experiments.surprise_gates import Reading, gains
from hope_jax import online
from hope_jax.training.errors import UserError


@pytest.fixture(scope="module")
def make():
    return surprise_gates.session_maker(surprise_gates.TINY)


@pytest.fixture(scope="module")
def text():
    return np.random.default_rng(0).integers(97, 107, 400).astype(np.uint8)


def test_writing_everything_at_random_is_always(make, text):
    whole = surprise_gates.read(make(online.always()), text)
    assert surprise_gates.read_randomly(make(online.always()), text, 1.0) == whole
    half = surprise_gates.read_randomly(make(online.always()), text, 0.5)  # 24 chunks
    assert abs(half.written - 0.5) < 3 * (0.25 / 24) ** 0.5
    assert whole.written == 1
    never = surprise_gates.read_randomly(make(online.always()), text, 0.0)
    assert never.written == 0 and never.loss > whole.loss


def test_the_oracle_is_no_worse_than_the_bounds_it_chooses_from(make, text):
    oracle = surprise_gates.read_with_oracle(make(online.always()), text, look=2)
    always, never = (surprise_gates.read_randomly(make(online.always()), text, share) for share in (1.0, 0.0))
    assert oracle.loss <= max(always.loss, never.loss) and 0 < oracle.written <= 1


def test_gains_are_shares_between_the_bounds():
    found = {"never": [Reading(3.0, 0)], "always": [Reading(2.0, 1)], "half": [Reading(2.25, 0.5)]}
    assert [gains(found, name) for name in found] == [[0], [1], [0.75]]


@pytest.mark.slow
def test_tiny(tmp_path):
    options = dataclasses.replace(surprise_gates.TINY, out=tmp_path, results=tmp_path / "numbers.json")
    found, picture = surprise_gates.run(options, Console(quiet=True))
    assert picture.stat().st_size > 0 and set(found) == set(json.loads(options.results.read_text()))


def test_a_run_is_needed():
    with pytest.raises(UserError, match="make train"):
        surprise_gates.session_maker(surprise_gates.GateOptions())
