"""The report says what the records say, and nothing else."""

import dataclasses
import math
import statistics

import pytest

from experiments.cells import scores_of, show, table_cells
from experiments.comparisons import write_comparison
from experiments.mqar import RecallOptions
from experiments.plots import against_steps, bars, matrix
from experiments.published import TABLES, Table
from experiments.records import Record, write
from experiments.report import NONE, ReportOptions, report
from hope_jax.training.errors import UserError

BASE = Record(
    experiment="formal_languages",
    model="hope",
    column="parity",
    setting="",
    seed=0,
    options={"learning_rates": [0.001], "seeds": [0], "pairs": [4]},
    config={},
    parameters=1234,
    state_bytes=4096,
    steps=500,
    seconds=60.0,
    cpu_seconds=90.0,
    compile_seconds=5.0,
    tokens_per_second=1000,
    scores={"bin0": 0.981, "bin1": 0.1},
    curve=[],
    failed=None,
    machine="cpu: some processor",
    versions={},
    commit="abc",
    command="python -m experiments.formal_languages --models hope",
)


def record(rate=0.001, seed=0, scores=None, **changes):
    changes["options"] = {"learning_rates": [rate], "seeds": [seed], "pairs": [4]}
    return dataclasses.replace(BASE, seed=seed, scores=BASE.scores if scores is None else scores, **changes)


TABLE = TABLES["formal_languages"]


def cell(records, table=TABLE, column="parity"):
    return show(table_cells(records, table)["hope", column], table, column)


def test_the_best_configuration_is_the_best_mean_over_its_seeds():
    """One lucky seed of another learning rate does not count, nor one that has no others; bin1 decides before bin0."""
    lucky = [record(0.01, 0, {"bin0": 1.0, "bin1": 1.0}), record(0.01, 1, {"bin0": 1.0, "bin1": 0.0})]
    alone = record(0.3, 0, {"bin0": 1.0, "bin1": 1.0})
    steady = [record(0.1, seed, {"bin0": 0.5, "bin1": 0.6 + 0.1 * seed}) for seed in (0, 1)]
    assert cell([*lucky, alone, *steady]) == "50.0 ± 0.0 / 65.0 ± 7.1"
    assert table_cells([*lucky, alone, *steady], TABLE)["hope", "parity"][""].tried == 3


def test_a_failed_run_is_in_no_mean_and_is_counted():
    failed = record(0.1, 1, {}, failed="not finite at step 3")
    runs = [record(0.1, 0, {"bin0": 1.0, "bin1": 0.5}), failed]
    assert cell(runs) == "100.0 / 50.0 [1 of 2 runs not finite]"


def test_a_failed_run_does_not_help_its_configuration():
    """Where configurations are compared it knows nothing: no string, and 8 bits of a byte."""
    table = Table("", ("bits",), ("bits",))
    runs = [record(rate, seed, {"bits": 2.0 + rate + seed}) for rate in (0.1, 0.2) for seed in (0, 1)]
    assert cell(runs, table) == "2.600 ± 0.707"
    failed = record(0.1, 1, {}, failed="not finite at step 3")
    assert cell([runs[0], failed], table) == "2.100 [1 of 2 runs not finite]"
    assert cell([runs[0], failed, *runs[2:]], table) == "2.700 ± 0.707"
    failures = [record(0.3, seed, {}, failed="not finite at step 3") for seed in range(3)]
    assert cell([runs[0], *failures], table) == "2.100"


def test_a_setting_whose_runs_all_failed_is_not_in_the_mean():
    runs = [
        record(scores={"score": 0.5}, column="compression", setting="baseline"),
        record(scores={}, failed="not finite at step 3", column="compression", setting="vocab=32"),
    ]
    assert cell(runs, TABLES["mad"], "compression") == "50.0 [1 of 11, 1 of 2 runs not finite]"


def test_no_bar_for_what_has_no_number():
    runs = [record(model="lstm"), record(model="srwm", scores={}, failed="not finite at step 3")]
    axes = bars(table_cells(runs, TABLE), TABLE).axes[0]
    assert [(bar.get_label(), len(bar)) for bar in axes.containers] == [("lstm", 1), ("srwm", 0)]


def test_a_score_that_was_not_measured_is_no_zero():
    """Left out where no row has it, a dash where only this one does not."""
    table = Table("", ("short", "long", "never"), ("short",))
    runs = [record(scores={"short": 1.0}), record(scores={"short": 0.5, "long": 0.25}, model="lstm")]
    cells = table_cells(runs, table)
    shown = table._replace(scores=scores_of(table, cells, "parity"))
    assert [show(cells[model, "parity"], shown, "parity") for model in ("hope", "lstm")] == ["100.0 / –", "50.0 / 25.0"]


def test_curves_are_those_of_the_records():
    """Over steps and over processor time, mean and spread of the seeds; a failed run has no curve."""
    values = ((4.0, 3.0), (5.0, 3.5))
    runs = [
        record(
            0.1,
            seed,
            {"bits_per_byte": bits[-1]},
            curve=[(250, {"bits_per_byte": bits[0]}), (500, {"bits_per_byte": bits[1]})],
        )
        for seed, bits in enumerate(values)
    ]
    runs.append(record(0.1, 0, {}, model="muon", failed="not finite at step 3", curve=[]))
    table = TABLES["optimizer_lm"]
    over_steps, over_time = against_steps(table_cells(runs, table), table).axes
    [line], [timed] = over_steps.lines, over_time.lines
    assert line.get_xdata().tolist() == [250, 500] and line.get_ydata().tolist() == [4.5, 3.25]
    assert timed.get_xdata() == pytest.approx([250 * 90 / 499, 500 * 90 / 499])
    assert timed.get_ydata().tolist() == [4.5, 3.25]


def test_one_seed_has_no_spread():
    assert cell([record()]) == "98.1 / 10.0"


def test_a_column_is_the_mean_of_the_best_of_its_settings():
    table = TABLES["mad"]
    runs = [
        record(0.1, 0, {"score": 0.2}, column="compression", setting="baseline"),
        record(0.2, 0, {"score": 0.4}, column="compression", setting="baseline"),
        record(0.1, 0, {"score": 1.0}, column="compression", setting="vocab=32"),
    ]
    assert cell(runs, table, "compression") == "70.0 [2 of 11]"


def test_the_spread_of_a_column_is_over_the_seeds_that_all_of_its_settings_have():
    table = TABLES["mad"]
    found = {"baseline": {0: 0.0, 1: 0.2, 2: 0.4}, "vocab=32": {1: 0.4, 2: 0.8, 3: 1.0}}
    runs = [
        record(seed=seed, scores={"score": score}, column="compression", setting=setting)
        for setting, scores in found.items()
        for seed, score in scores.items()
    ]
    want = statistics.stdev([(0.2 + 0.4) / 2, (0.4 + 0.8) / 2])
    assert cell(runs, table, "compression") == f"{100 * (0.2 + 2.2 / 3) / 2:.1f} ± {100 * want:.1f} [2 of 11]"


def test_report_shows_records_and_published_numbers_and_invents_nothing(tmp_path):
    runs = [
        record(),
        record(seed=1, commit="abd", machine="cpu: another"),
        record(0.1, 0, {}, model="lstm", failed="not finite at step 3: loss nan"),
    ]
    runs += [
        record(
            model=model, experiment="mqar", column=f"4 pairs, D {width}", scores={"accuracy": 0.5}, state_bytes=width
        )
        for model in ("hope", "transformer")
        for width in (8, 16)
    ]
    curve = [(250, {"bits_per_byte": 4.0}), (500, {"bits_per_byte": 3.0})]
    runs += [
        record(0.1, seed, {"bits_per_byte": 3.0}, model="m3", experiment="optimizer_lm", column="tiny", curve=curve)
        for seed in (0, 1)
    ]
    for number, one in enumerate(runs):
        write(tmp_path / "results" / one.experiment / f"{number}.json", one)
    text = report(ReportOptions(tmp_path / "results", tmp_path)).read_text()
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    languages = text[text.index("## Formal") : text.index("## MAD")]
    assert f"| hope | 98.1 ± 0.0 / 10.0 ± 0.0 | {' | '.join([NONE] * 5)} |" in languages
    assert "| hope, published | 100 / 100 | 100 / 100 |" in languages
    assert f"| lstm | not finite | {' | '.join([NONE] * 5)} |" in languages
    assert f"| srwm | {' | '.join([NONE] * 6)} |" in languages
    assert (
        "0 (not finite at step 3: loss nan)" in languages
        and "0 1 | 1 | 1,234 | 500 | 1.5 | 180.4 | abc abd | M1 M2 |" in languages
    )
    assert "`python -m experiments.formal_languages --models hope --seeds 0 1`" in languages
    assert "arXiv:2512.24695, Table 5" in languages and "No records yet." in text[text.index("## MAD") :]
    assert "| model | 4 pairs, D 8 | 4 pairs, D 16 |" in text
    assert "- M1: cpu: some processor" in text and rows
    for name in ("formal_languages", "mqar", "mqar_state", "optimizer_lm", "optimizer_lm_curve"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"](plots/{name}.png)" in text
    assert not (tmp_path / "plots" / "mad.png").exists()


@pytest.mark.parametrize("name", TABLES)
def test_published_rows_are_whole(name):
    table = TABLES[name]
    assert all(tuple(row) == table.columns for row in table.published.values())
    assert bool(table.published) == bool(table.source)


def test_an_experiment_without_a_layout_shows_all_its_scores(tmp_path):
    write(tmp_path / "new" / "0.json", record(experiment="new", scores={"x": 0.25, "y": 0.5}))
    text = report(ReportOptions(tmp_path, tmp_path)).read_text()
    assert "| hope | 25.0 / 50.0 |" in text[text.index("## new") :]
    assert Table("new", ("x",), ("x",)).columns == ()


def test_what_was_measured_side_by_side_has_a_section(tmp_path):
    values = {"awake": {"bits": [1.0, 2.0]}, "rested": {"bits": [1.25], "kept": [math.nan, 1.0]}}
    options = RecallOptions(steps=7, tiny=True, results=tmp_path / "sleep.json")
    found = write_comparison("sleep", "Sleep", "2 texts", values, options)
    assert "NaN" not in options.results.read_text()  # which is no JSON
    text = report(ReportOptions(tmp_path, tmp_path)).read_text()
    lines = ["## Sleep", "", "|  | bits | kept |", "|---|---|---|", "| awake | 1.50 ± 0.71 | – |"]
    assert "\n".join([*lines, "| rested | 1.250 | 1.000 [1 of 2] |"]) in text
    assert "Over 2 texts." in text and "python -m experiments.sleep --steps 7 --tiny" in text and found.machine in text


def test_a_file_that_is_no_comparison_is_named(tmp_path):
    (tmp_path / "old.json").write_text('{"never": []}')
    with pytest.raises(UserError, match=r"old.json is no comparison .* run it again"):
        report(ReportOptions(tmp_path, tmp_path))


def test_a_model_that_failed_has_no_panel_in_the_matrix():
    options = {"learning_rates": [0.001], "seeds": [0], "chunks": [16]}
    made = dataclasses.replace(BASE, experiment="chunk_transfer", options=options)
    works = dataclasses.replace(made, column="clock", scores={"bits_at_16": 2.0, "bits_tuned_16": 1.5})
    failed = dataclasses.replace(made, column="memory", model="titans, trained at 16", scores={}, failed="not finite")
    table = TABLES["chunk_transfer"]
    figure = matrix(table_cells([works, failed], table), table)
    assert [axes.images[0].get_array().tolist() for axes in figure.axes] == [[[2.0]], [[1.5]]]
