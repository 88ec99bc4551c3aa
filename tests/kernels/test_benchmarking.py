"""Side-by-side timing: turns, medians, ratios, the table and the file."""

import json

import jax.numpy as jnp
import pytest

from hope_kernels.benchmarking import machine_line, table, time_side_by_side, write_json

# Start and end of each timed call: two functions, three turns; medians 4 s and 2 s.
READINGS = [0, 4, 10, 12, 20, 23, 30, 31, 40, 49, 50, 58]


def fake_timings():
    clock = iter([float(t) for t in READINGS])
    functions = {"slow": jnp.sin, "fast": jnp.cos}
    return time_side_by_side(functions, jnp.ones(3), case="case", base="slow", repeats=3, clock=lambda: next(clock))


def test_functions_take_turns_and_medians_are_compared():
    slow, fast = fake_timings()
    assert (slow.median, slow.fastest, slow.ratio) == (4.0, 3.0, 1.0)
    assert (fast.median, fast.fastest, fast.ratio) == (2.0, 1.0, 2.0)


def test_table_and_file(tmp_path):
    timings = fake_timings()
    lines = table(timings).splitlines()
    assert [line.split()[1] for line in lines] == ["implementation", "slow", "fast"]
    assert lines[2].endswith("2.0 than slow")
    write_json(tmp_path / "timings.json", timings)
    record = json.loads((tmp_path / "timings.json").read_text())
    assert record["machine"] == machine_line()
    assert record["timings"][1]["ratio"] == 2.0


def test_an_unknown_base_is_refused():
    with pytest.raises(ValueError, match="base must be one of a; got 'b'"):
        time_side_by_side({"a": jnp.sin}, jnp.ones(3), case="case", base="b")
