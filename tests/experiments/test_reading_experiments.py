"""Learning at test time, chunk transfer, levels: what is trained, what is measured, what is drawn."""

import dataclasses
import itertools
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import chunk_transfer, levels_and_frequency, niah, plots, records, test_time_learning, text
from experiments.cells import table_cells
from experiments.chunk_transfer import TransferOptions
from experiments.levels_and_frequency import LevelOptions
from experiments.options import cells, model_config
from experiments.published import TABLES
from experiments.running import run
from experiments.test_time_learning import LearningOptions, cost, learning, window_of_cost
from experiments.training import Trained
from hope_jax.models import build_lm
from hope_jax.training.errors import UserError
from tests.experiments.test_report import record

[LEARN] = cells(dataclasses.replace(test_time_learning.TINY, trainings=("meta",)))
[TRANSFER] = cells(dataclasses.replace(chunk_transfer.TINY, what=("clock",), models=("auto",)))


def test_cost_is_what_a_count_by_hand_says():
    """Products of a byte: D 8, 2 levels of 16, attention to 16 bytes read and a chunk of 8, a head of 256.

    The program also has the gains of 4 norms and the angles of queries and keys as products.
    """
    plain = model_config(LEARN, vocab_size=256, length=LEARN.length)
    plain = dataclasses.replace(plain, max_length=32)
    by_hand = 2 * (4 * 8 * 8 + 2 * 8 * (16 + 8) + 2 * 2 * 8 * 16 + 8 * 256 + 4 * 8 + 2 * 4)
    assert cost(plain, LEARN) == by_hand
    # Reading, reading again at the start of the write, and a gradient that needs less than twice that.
    assert 2 * by_hand < cost(learning(plain, LEARN, 0.1), LEARN) < 4 * by_hand


def test_a_window_costs_no_less_than_learning_and_hardly_more():
    plain = model_config(LEARN, vocab_size=256, length=LEARN.length)
    plain = dataclasses.replace(plain, max_length=32)
    least = cost(learning(plain, LEARN, 0.1), LEARN)
    found = window_of_cost(plain, LEARN)
    assert found.name == "swa" and found.window == LEARN.length and found.dim == found.heads * 8
    narrower = dataclasses.replace(found, dim=found.dim - 8, heads=found.heads - 1)
    assert cost(narrower, LEARN) < least <= cost(found, LEARN)


@pytest.mark.parametrize("training", test_time_learning.TRAININGS)
def test_all_trainings_go_on_from_pretraining(training, monkeypatch):
    asked = []
    begun = SimpleNamespace(params="params", failed=None)
    monkeypatch.setattr(test_time_learning, "pretrained", lambda config, cell: asked.append((config, cell)) or begun)
    cell = dataclasses.replace(LEARN, trainings=(training,), eta=0.5)
    job = test_time_learning.prepare(cell)
    [(config, shared)] = asked
    assert job.model.init(jax.random.key(0)) == "params"
    assert config.fast_chunks == () and (config.name == "swa") == (training == "window")
    assert job.config.fast_chunks == ((8,) if training == "meta" else ()) and job.row.startswith(
        {"ad_hoc": "ad hoc", "meta": "meta-trained, eta 0.5", "window": "window"}[training]
    )
    assert shared.trainings == LearningOptions().trainings  # the others find the same parameters
    batches = test_time_learning.stream(cell)
    skipped = [next(batches) for _ in range(cell.pretraining)]
    first = next(job.batches).tokens
    assert (first == next(batches).tokens).all() and all((first != batch.tokens).any() for batch in skipped)


def test_failed_pretraining_is_a_failed_cell(monkeypatch, tmp_path):
    failed = Trained(None, 1, [], 0.0, 0.0, 0.1, None, "not finite at step 1")
    monkeypatch.setattr(test_time_learning, "pretrained", lambda config, cell: failed)
    run("test_time_learning", dataclasses.replace(LEARN, results=tmp_path), test_time_learning.prepare)
    [found] = records.read_all(tmp_path)
    assert found.failed == "pre-training: not finite at step 1" and found.scores == {}


def test_a_column_is_a_document_with_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(test_time_learning, "pretrained", lambda *_: SimpleNamespace(params=None, failed=None))
    columns = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.txt").write_text("0123456789" * 20)
        cell = dataclasses.replace(LEARN, documents=(str(tmp_path / folder / "test.txt"),))
        columns.append(test_time_learning.prepare(cell).column)
    assert columns == ["a/test", "b/test"]


@pytest.mark.parametrize(("failed", "bits"), [(None, np.nan), (None, np.inf), ("not finite at step 1", 2.0)])
def test_a_chunk_that_diverges_knows_nothing(failed, bits, monkeypatch):
    monkeypatch.setattr(chunk_transfer, "train", lambda *_: SimpleNamespace(params=bits, failed=failed))
    monkeypatch.setattr(chunk_transfer, "by_place", lambda read, params, tests: np.full(5, params))
    scores = chunk_transfer.prepare(TRANSFER).evaluate(2.0)
    assert scores == {"bits_at_8": 2.0, "bits_tuned_8": 8.0}


def test_a_rate_that_diverges_knows_nothing(monkeypatch):
    cell = dataclasses.replace(LEARN, etas=(0.25,))
    plain = model_config(cell, vocab_size=256, length=cell.length)
    monkeypatch.setattr(test_time_learning, "by_place", lambda read, params, tests: np.full(32, np.nan))
    reading = SimpleNamespace(bits_T=np.full(32, np.inf), written=0.25)
    monkeypatch.setattr(test_time_learning, "gated_reader", lambda config: lambda *_: reading)
    found = test_time_learning.scores(cell, plain, None, np.zeros((2, 33)))
    bits = {name: value for name, value in found.items() if name.startswith("bits")}
    assert len(bits) == 6 and set(bits.values()) == {8.0}


def test_second_halves_are_scored(monkeypatch):
    """A reader whose bits at a place are its learning rate in the first half and that plus one in the second."""
    monkeypatch.setattr(test_time_learning, "reader", lambda config: config.cms_eta if config.cms_chunks else 0.0)
    monkeypatch.setattr(
        test_time_learning, "by_place", lambda read, params, tests: np.repeat([read, read + 1], tests.shape[1] // 2)
    )
    monkeypatch.setattr(
        test_time_learning,
        "gated_reader",
        lambda config: lambda params, tests, gate: SimpleNamespace(bits_T=np.repeat([0.0, 7.0], 16), written=0.25),
    )
    cell = dataclasses.replace(LEARN, etas=(0.25, 2.0))
    plain = model_config(cell, vocab_size=256, length=cell.length)
    found = test_time_learning.scores(cell, plain, None, np.zeros((2, 33)))
    gates = ("first_half", "threshold", "ema", "budget")
    expected = {"bits_frozen": 1.0, "bits_eta_0.25": 1.25, "bits_eta_2": 3.0}
    assert found == expected | {f"bits_gate_{gate}": 7.0 for gate in gates} | {
        f"written_{gate}": 0.25 for gate in gates
    }


def test_every_serving_chunk_is_measured_before_and_after_tuning(monkeypatch):
    """Bits are half the serving chunk, and half a bit more once tuned; tuning reads batches that training did not."""
    tuned = []

    def train(model, batches, loss, evaluate, cell):
        tuned.append((model.init(None), list(batches), cell.steps, cell.learning_rates))
        return SimpleNamespace(params=1.0, failed=None)

    monkeypatch.setattr(chunk_transfer, "train", train)
    monkeypatch.setattr(chunk_transfer, "reader", lambda config: config.fast_chunks[0])
    monkeypatch.setattr(chunk_transfer, "by_place", lambda read, params, tests: np.full(5, (read + params) / 2))
    cell = dataclasses.replace(TRANSFER, chunks=(8,), serve=(2, 8), tune_steps=3, steps=4)
    job = chunk_transfer.prepare(cell)
    assert job.config.fast_chunks == (8,) and job.row == "hope_attention, trained at 8"
    assert job.evaluate(0.0) == {"bits_at_2": 1, "bits_tuned_2": 1.5, "bits_at_8": 4, "bits_tuned_8": 4.5}
    assert [(start, steps, rates) for start, _, steps, rates in tuned] == 2 * [(0.0, 3, (1e-3,))]
    trained = [batch.tokens for batch in itertools.islice(job.batches, cell.steps + 1)]  # the last is not stepped on
    for _, batches, _, _ in tuned:
        assert len(batches) == 4  # one is made ahead
        assert not any((one.tokens == seen).all() for one in batches for seen in trained)


def test_memories_are_served_with_other_chunks():
    [cell] = cells(dataclasses.replace(TRANSFER, what=("memory",), chunks=(8,), models=("titans",)))
    config = chunk_transfer.prepare(cell).config
    served = chunk_transfer.with_chunk(config, "memory", 4)
    assert (config.chunk_mem, config.chunk_proj) == (8, 8) and (served.chunk_mem, served.chunk_proj) == (4, 4)


def test_levels_share_one_width():
    [one, three] = cells(dataclasses.replace(levels_and_frequency.TINY, clocks=("none", "4-8")))
    single, several = (levels_and_frequency.prepare(cell) for cell in (one, three))
    assert (single.config.fast_chunks, single.config.cms_hidden, single.row) == ((), (32,), "1 level")
    assert (several.config.fast_chunks, several.config.cms_hidden) == ((4, 8), (10, 10, 10))
    assert several.row == "3 levels, slowest 8 (4-8)" and several.config.cms_eta == 0.3
    asked = levels_and_frequency.prepare(dataclasses.replace(three, tasks=("qa1",), length=256))
    assert (asked.column, asked.config.fast_chunks, asked.row) == ("qa1", (4, 8), several.row)
    assert next(asked.batches).tokens.shape == (2, 255) and asked.cell.overrides == several.cell.overrides


def test_needles_are_those_of_their_own_experiment_and_found_by_who_looks_them_up(monkeypatch):
    def say(_, params, pieces, count):
        found = [re.findall(rb" is (\d+)\. ", bytes(row.tolist()))[-1] for row in np.concatenate(list(pieces), axis=1)]
        assert {len(one) for one in found} == {count}
        return np.array([list(one) for one in found])

    monkeypatch.setattr(levels_and_frequency, "answers", say)
    [cell] = cells(dataclasses.replace(levels_and_frequency.TINY, clocks=("none",)))
    job = levels_and_frequency.prepare(cell)
    assert job.evaluate(None) == {"values": 1.0, "characters": 1.0}
    task = niah.NeedleOptions(tasks=("S-NIAH-1",), batch_size=2, length=cell.length, digits=2, seeds=(0,))
    assert (next(job.batches).tokens == next(niah.stream(task)).tokens).all()


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (LearningOptions, {"trainings": ("met",)}, "unknown training 'met'; did you mean 'meta'"),
        (LearningOptions, {"half": 100}, "half must be a multiple of fast, 32"),
        (LearningOptions, {"share": 1.5}, "share is a part of the chunks, from 0 to 1; got 1.5"),
        (LearningOptions, {"etas": (0.0,)}, r"inner learning rates must be positive; got eta 0.3, etas \(0.0,\)"),
        (TransferOptions, {"what": ("clocks",)}, "unknown kind of chunk 'clocks'; did you mean 'clock'"),
        (
            TransferOptions,
            {"models": ("titans",)},
            "titans has no chunks of the kind 'clock'; use hope_attention or hope",
        ),
        (LevelOptions, {"tasks": ("qa21",)}, "unknown task 'qa21'"),
        (LevelOptions, {"clocks": ("8,32",)}, "clocks are \"none\" or bytes, fastest first, such as 8-32; got '8,32'"),
        (LevelOptions, {"eta": -0.1}, "eta must be at least 0; got -0.1"),
    ],
)
def test_what_cannot_be_is_refused(options, changes, message):
    with pytest.raises(UserError, match=message):
        options(**changes)


def test_a_serving_chunk_as_long_as_the_window_is_refused():
    with pytest.raises(UserError, match="never read what the CMS level with chunk 17 writes"):
        chunk_transfer.prepare(dataclasses.replace(TRANSFER, serve=(17,)))


def test_pictures_hold_the_records(tmp_path):
    bits = {"bits_frozen": 4.0, "bits_eta_0.1": 3.0, "bits_eta_0.3": 2.0}
    gates = {"bits_gate_ema": 2.5, "written_ema": 0.4}
    learned = [record(model="ad hoc", scores=bits | gates), record(model="window", scores={"bits_frozen": 2.2})]
    moved = [
        record(
            model=f"titans, trained at {t}", scores={f"bits_{k}_{s}": t / s for k in ("at", "tuned") for s in (4, 8)}
        )
        for t in (4, 8)
    ]
    levels = [
        record(model=clocks, scores={"values": value, "characters": 1.0})
        for clocks, value in (("none", 0.1), ("32", 0.2), ("64", 0.3), ("8-32", 0.4))
    ]
    for one in learned:
        one.options["eta"] = 0.3
    for one, chunk in zip(moved, (4, 8), strict=True):
        one.options["chunks"] = [chunk]
    for one in levels:
        one.options.update(clocks=[one.model], eta=0.3)
    found = {"test_time_learning": learned, "chunk_transfer": moved, "levels_and_frequency": levels}
    tables = {name: table_cells(runs, TABLES[name]) for name, runs in found.items()}

    over_rate, over_share = plots.against_rate(tables["test_time_learning"], TABLES["test_time_learning"]).axes
    assert [line.get_xydata().tolist() for line in over_rate.lines if line.get_linestyle() == "-"] == [
        [[0.1, 3], [0.3, 2]]
    ]
    assert over_share.lines[0].get_xydata().tolist() == [[0, 4], [100, 2], [40, 2.5]]
    before, after = plots.matrix(tables["chunk_transfer"], TABLES["chunk_transfer"]).axes
    assert before.images[0].get_array().tolist() == after.images[0].get_array().tolist() == [[1.0, 0.5], [2.0, 1.0]]
    [axes] = plots.against_clock(tables["levels_and_frequency"], TABLES["levels_and_frequency"]).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["2 levels"] == [[32, 20], [64, 30]] and lines["3 levels"] == [[32, 40]]
    assert [y for _, y in lines["1 level"]] == [10, 10]
    for name, cells_ in tables.items():
        assert len(plots.draw(name, cells_, TABLES[name], tmp_path)) == 2


def test_defaults_are_cells_that_can_be_built():
    """No compilation: every clock and chunk fits the length."""
    for cell in cells(LevelOptions(tasks=("S-NIAH-1",))):
        assert build_lm(levels_and_frequency.prepare(cell).config)
    for cell in cells(TransferOptions()):
        assert chunk_transfer.prepare(cell).row.endswith(f"trained at {cell.chunks[0]}")
    assert text.corpus("embedded").train.size > 0
