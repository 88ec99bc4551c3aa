"""Sleep, measured: each state of a session is what its name says."""

import dataclasses
import math
import re

import numpy as np
import pytest
from rich.console import Console

from experiments import consolidation
from experiments.comparisons import read_comparisons
from experiments.consolidation import SleepOptions, bits
from experiments.sessions import session_maker
from experiments.text import corpus
from hope_jax import online
from hope_jax.training.errors import UserError

TEXT = np.frombuffer(b"the same words again and again; " * 8, np.uint8)


@pytest.fixture(scope="module")
def session():
    return session_maker(None, (), tiny=True)(online.always())


def test_states(session):
    found = consolidation.states(session, TEXT, dataclasses.replace(consolidation.TINY, keeps=(0.0, 1.0)))
    assert list(found) == ["before", "awake", "emptied", "rested 256, 0", "rested 256, 1"] and session.tokens == 0
    apart = {name: one.diff(session) for name, one in found.items()}
    assert min(apart["awake"].values()) > 0 == max(apart["before"].values())
    assert apart["emptied"]["level_0"] == apart["rested 256, 0"]["level_0"] == 0
    emptied, free, kept = (found[name].diff(found["awake"])["level_1"] for name in list(found)[2:])
    assert emptied == 0 < kept < free


def test_the_context_does_not_count(session):
    read = session.fork()
    read.observe(TEXT, update_allowed=False)
    assert bits(read, TEXT) == bits(session, TEXT) == pytest.approx(session.score(TEXT) / math.log(2))
    assert read.score(TEXT) != session.score(TEXT)


@pytest.mark.parametrize("buffers", [(), (1,), (9000,)])
def test_a_buffer_holds_what_was_read(buffers):
    message = f"2 to tokens=8192 bytes of what was read; got {list(buffers)}"
    with pytest.raises(UserError, match=re.escape(message)):
        SleepOptions(buffers=buffers)


def test_what_is_read_is_not_what_is_not_read():
    """Of one text: from its two ends, and refused where they meet."""
    held_out = corpus("embedded").validation
    options = dataclasses.replace(consolidation.TINY, tokens=len(held_out) - 128)
    np.testing.assert_array_equal(consolidation.text_to_read("embedded", options), held_out[:-128])
    with pytest.raises(UserError, match=f"{len(held_out)} bytes where {len(held_out) + 1} are needed"):
        consolidation.text_to_read("embedded", dataclasses.replace(options, tokens=len(held_out) - 127))


@pytest.mark.slow
def test_tiny(tmp_path):
    options = dataclasses.replace(consolidation.TINY, out=tmp_path, results=tmp_path / "numbers.json")
    found, picture = consolidation.run(options, Console(quiet=True))
    [written] = read_comparisons(tmp_path)
    assert picture.stat().st_size > 0
    for name, by_kind in found.items():
        assert {kind: written.values[name][f"bits per byte, {kind}"] for kind in consolidation.KINDS} == by_kind


def test_sleep_is_accepted_where_it_keeps_something_within_the_bound():
    bits = {"awake": (1.0, 3.0), "emptied": (2.0, 2.0), "rested": (1.5, 2.1), "rested dear": (1.5, 2.2)}
    bits |= {"rested empty": (1.999, 2.0)}
    found = {name: {"read": [read, read], "not read": [0.0, other]} for name, (read, other) in bits.items()}
    verdicts = {name: consolidation.accepted(found, name, 0.15) for name in bits if name.startswith("rested")}
    assert verdicts == {"rested": [1, 1], "rested dear": [1, 0], "rested empty": [0, 0]}
    assert consolidation.kept(found, "rested dear") == [0.5, 0.5]
