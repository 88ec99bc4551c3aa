"""Where the wall time goes: every instant in one category, over restarts too."""

import json

import pytest

from hope_jax.training import goodput
from hope_jax.training.goodput import CATEGORIES, Clock, Incarnation, brought_up_to_date, read_goodput, summarize


@pytest.fixture
def wait(monkeypatch):
    """A function that lets seconds pass, on the clock that `goodput` reads."""
    now = [100.0]

    def wait(seconds):
        now[0] += seconds

    monkeypatch.setattr(goodput.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(goodput.time, "time", lambda: 1e9 + now[0])
    return wait


def test_the_categories_of_a_clock_sum_to_the_wall_time(tmp_path, wait):
    clock = Clock()
    wait(1)
    with clock.keep(tmp_path):
        wait(2)
        with clock.doing("step"):
            wait(4)
            with clock.doing("save"):
                wait(8)
            wait(16)
        with clock.doing("eval"):
            wait(32)
        assert clock.summary().wall == clock.elapsed == 63
    (found,) = read_goodput(tmp_path)
    assert found.seconds == dict.fromkeys(CATEGORIES, 0.0) | {"step": 20, "save": 8, "eval": 32, "other": 3}
    assert found.until - found.began == 63
    assert found.doing == "ended" and not found.finished


def incarnation(began, first, last, finished=False, **seconds):
    return Incarnation(began, began + sum(seconds.values()), first, last, "step", finished, seconds)


def test_a_restart_costs_the_gap_and_the_steps_that_are_taken_again():
    """Saved at step 4 of 10, dead, again at 4, dead at 6 before a save, and again at 4."""
    rows = [
        incarnation(0, 0, 10, step=20, compile=5),
        incarnation(40, 4, 6, step=6, restore=1),
        incarnation(50, 4, 12, finished=True, step=16, save=1),
    ]
    found = summarize(rows)
    assert found.seconds["repeated"] == 20 * 6 / 10 + 6
    assert found.seconds["step"] == 8 + 16
    assert found.seconds["down"] == 15 + 3
    assert found.wall == 67 and found.goodput == 24 / 67


def test_the_time_between_a_finished_run_and_a_longer_one_is_nobodys():
    rows = [incarnation(0, 0, 10, finished=True, step=10), incarnation(1000, 10, 20, finished=True, step=10)]
    assert summarize(rows).wall == 20 and summarize(rows).goodput == 1
    assert summarize([]).goodput == 0


def test_a_killed_process_is_known_by_its_last_record():
    rows = [incarnation(0, 0, 4, step=8, compile=2), incarnation(20, 4, 6, step=4)]
    first, second = brought_up_to_date(rows, [{"step": 8, "seconds": 18.5}, {"step": 8}])
    assert first == rows[0]
    assert (second.last_step, second.until, second.seconds) == (8, 28.5, {"step": 8.5})
    assert brought_up_to_date(rows, [{"step": 6, "seconds": 99}]) == rows
    assert brought_up_to_date([], [{"step": 6, "seconds": 99}]) == []


def test_the_file_says_what_goes_on_and_survives_damage(tmp_path, wait):
    clock = Clock()
    with clock.keep(tmp_path, 3):
        wait(7)
        with clock.doing("compile"):
            assert read_goodput(tmp_path)[-1].doing == "compile"
        clock.step(4)
        clock.finished = True
    wait(20)
    again = Clock()
    with again.keep(tmp_path):
        first, second = read_goodput(tmp_path)
        assert (first.first_step, first.last_step, first.finished, second.doing) == (3, 4, True, "other")
        assert again.began == first.began
        wait(2)
        assert again.machine_seconds == 9
    (tmp_path / "goodput.json").write_text('[{"began": 1')
    assert read_goodput(tmp_path) == []
    (tmp_path / "goodput.json").write_text(json.dumps([{"strange": 1}]))
    assert read_goodput(tmp_path) == []
