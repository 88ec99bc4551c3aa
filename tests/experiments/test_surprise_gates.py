"""Gates between the bounds: every reading is of the same chunks, and the oracle looks ahead."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from experiments import surprise_gates
from experiments.comparisons import read_comparisons
from experiments.sessions import session_maker, text_of
from experiments.surprise_gates import Reading, gains
from experiments.text import corpus
from hope_jax import online
from hope_jax.training.errors import UserError


@pytest.fixture(scope="module")
def make():
    return session_maker(None, (), tiny=True)


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


@pytest.mark.parametrize("helps", [[True] * 24, [False] * 24, [True, False] * 12])
def test_the_oracle_writes_the_chunks_that_help_what_comes_next(make, text, helps, monkeypatch):
    """Scores of the two forks by hand; the readings are those of writing just these chunks."""
    scores, seen = iter([score for good in helps for score in ((0, 1) if good else (1, 0))]), []
    monkeypatch.setattr(online.Session, "score", lambda session, ahead: seen.append(len(ahead)) or next(scores))
    oracle = surprise_gates.read_with_oracle(make(online.always()), text, look=2)
    draws = SimpleNamespace(random=iter([0.0 if good else 1.0 for good in [*helps, True]]).__next__)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: draws)
    assert oracle == surprise_gates.read_randomly(make(online.always()), text, 0.5)
    assert oracle.written == sum(helps) / 24
    assert seen == [32] * 44 + [31] * 2 + [15] * 2  # two chunks ahead, as far as the text goes


def test_gains_are_shares_between_the_bounds():
    found = {"never": [Reading(3.0, 0)], "always": [Reading(2.0, 1)], "half": [Reading(2.25, 0.5)]}
    assert [gains(found, name) for name in found] == [[0], [1], [0.75]]


def test_where_writing_does_not_help_there_is_no_gain():
    found = {"never": [Reading(3.0, 0)] * 2, "always": [Reading(2.0, 1), Reading(3.0, 1)]}
    found["half"] = [Reading(2.5, 0.5)] * 2
    assert np.array_equal(gains(found, "half"), [0.5, np.nan], equal_nan=True)
    assert np.isnan(surprise_gates.values_of(found)["half"]["gain"][1])


def test_the_embedded_text_that_is_read_is_held_out():
    np.testing.assert_array_equal(text_of("embedded"), corpus("embedded").validation)


@pytest.mark.slow
def test_tiny(tmp_path):
    options = dataclasses.replace(surprise_gates.TINY, out=tmp_path, results=tmp_path / "numbers.json")
    found, picture = surprise_gates.run(options, Console(quiet=True))
    [written] = read_comparisons(tmp_path)
    assert picture.stat().st_size > 0 and set(found) == set(written.values)
    for name, [reading] in found.items():
        assert written.values[name]["chunks written"] == [reading.written]
        assert written.values[name]["nats per token, second half"] == [reading.loss]


def test_a_run_is_needed():
    with pytest.raises(UserError, match="make train"):
        session_maker(None, (), tiny=False)
