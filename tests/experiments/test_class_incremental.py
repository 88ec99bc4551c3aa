"""Class-incremental learning: data sets on disk, what methods keep, and the arithmetic of the matrix."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from experiments import continual_baselines as baselines
from experiments import records
from experiments.cells import show, table_cells
from experiments.class_incremental import (
    TINY,
    IncrementalOptions,
    labels,
    prepare,
    stream_of,
    written_every,
)
from experiments.classifiers import Learner, adapting, as_it_is, filled, gradient, network, replay, vote, with_classes
from experiments.continual_baselines import Anchor, add, discriminant, draw, fisher, nearest_mean, observe, penalty
from experiments.intents import SOURCES, Examples, Labelled, encode, load, tasks_of, toy
from experiments.one_pass import Stream, accuracy, learn, summary
from experiments.options import cells
from experiments.plots import _matrix, matrices, with_spread
from experiments.published import TABLES
from experiments.running import run
from hope_jax.models import ModelConfig, build_lm
from hope_jax.training.errors import UserError


def examples(labels_N, length=1):
    """Texts of one byte each, the number of the row."""
    count = len(labels_N)
    rows_NT = np.tile(np.arange(count, dtype=np.uint8)[:, None], (1, length))
    return Examples(rows_NT, np.ones((count, length), bool), np.array(labels_N, np.int32), np.ones(count, np.float32))


# --- data sets --------------------------------------------------------------------------------------------------------


def write_clinc(folder, domains=None):
    (folder / "clinc150").mkdir()
    data = {
        "train": [["pay it", "bill"], ["what time", "clock"], ["my pin", "pin"]],
        "test": [["pay that", "bill"]],
        "oos_train": [["who is", "oos"]],
    }
    (folder / "clinc150" / "data_full.json").write_text(json.dumps(data))
    domains = domains or {"bank": ["bill", "pin"], "home": ["clock"]}
    (folder / "clinc150" / "domains.json").write_text(json.dumps(domains))


def test_clinc(tmp_path):
    write_clinc(tmp_path)
    data = load("clinc150", str(tmp_path))
    assert data.classes == ("bill", "clock", "pin")
    assert data.train.texts == ["pay it", "what time", "my pin"] and data.train.labels_N.tolist() == [0, 1, 2]
    assert data.test.texts == ["pay that"] and data.test.labels_N.tolist() == [0]
    orders = {tuple(tasks_of(data, SOURCES["clinc150"], seed)) for seed in range(8)}
    assert orders == {((0, 2), (1,)), ((1,), (0, 2))}


def test_banking(tmp_path):
    (tmp_path / "banking77").mkdir()
    for split, rows in (("train", [["a, b\nc", "x"], ["d", "y"]]), ("test", [["e", "y"]])):
        with (tmp_path / "banking77" / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["text", "category"], *rows])
    data = load("banking77", str(tmp_path))
    assert data.classes == ("x", "y") and data.train.texts == ["a, b\nc", "d"] and data.test.labels_N.tolist() == [1]


def test_dbpedia(tmp_path):
    (tmp_path / "dbpedia14").mkdir()
    rows = [{"label": "AB"[i % 2], "sentence": f"Title: T\nText:  abstract {i}\n"} for i in range(20)]
    (tmp_path / "dbpedia14" / "test.json").write_text(json.dumps(rows))
    data = load("dbpedia14", str(tmp_path))
    assert (len(data.train.texts), len(data.test.texts)) == (16, 4)
    assert sorted(data.train.texts + data.test.texts) == sorted(f"abstract {i}" for i in range(20))
    for texts, labels_N in (data.train, data.test):
        assert labels_N.tolist() == [int(text.split()[1]) % 2 for text in texts]


def test_folders_that_hold_something_else(tmp_path):
    with pytest.raises(UserError, match=r"no data_full\.json in .*--data takes the folder that holds clinc150/data_fu"):
        load("clinc150", str(tmp_path))
    write_clinc(tmp_path, {"bank": ["bill", "pin"]})
    with pytest.raises(UserError, match=r"is not clinc150 in the format .* domains do not share out the intents"):
        load("clinc150", str(tmp_path))
    (tmp_path / "banking77").mkdir()
    (tmp_path / "banking77" / "train.csv").write_text("sentence,category\nhello,x\n")
    with pytest.raises(UserError, match="is not banking77 in the format"):
        load("banking77", str(tmp_path))


def test_hub(monkeypatch):
    """Numbers with names, a class that is left out, a draw; and an answer that is no data set."""
    import datasets

    names = datasets.ClassLabel(names=["bill", "oos", "pin"])
    features = datasets.Features({"text": datasets.Value("string"), "intent": names})
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "intent": [2, 1, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: table)
    data = load("clinc150", "hub")
    assert data.classes == ("bill", "pin") and data.train.texts == ["a", "c"] and data.tasks is None
    with pytest.raises(UserError, match="fancyzhx/dbpedia_14 cannot be read from the hub"):
        load("dbpedia14", "hub")


def test_tasks_share_out_the_classes():
    data, source = toy(), SOURCES["toy"]
    assert sorted(sum(tasks_of(data, source, 1), ())) == list(range(6))
    assert len({tuple(tasks_of(data, source, seed)) for seed in range(5)}) > 1
    left_over = tasks_of(data, source._replace(task_classes=4), 0)
    assert [len(task) for task in left_over] == [6]


def test_encode():
    data = Labelled(["ab", "é", ""], np.array([1, 0, 1]))
    found = encode(data, 4, classes=[1])
    assert found.tokens_NT.tolist() == [[10, 97, 98, 0], [10, 0, 0, 0]]
    assert found.mask_NT.sum(axis=1).tolist() == [3, 1] and found.labels_N.tolist() == [1, 1]
    assert encode(data, 3).tokens_NT[1].tolist() == [10, *"é".encode()]


# --- what methods keep ------------------------------------------------------------------------------------------------


def test_penalty_gradient_is_the_formula(rng):
    """lambda F (theta - theta*), of a tree."""
    params, at, weight = ({"a": rng.normal(size=(3, 2)), "b": {"c": rng.normal(size=4)}} for _ in range(3))
    weight = jax.tree.map(np.square, weight)
    want = jax.tree.map(lambda p, a, f: 7.0 * f * (p - a), params, at, weight)
    found = jax.grad(penalty)(jax.tree.map(jnp.asarray, params), Anchor(at, weight), 7.0)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found, want)


def test_fisher_is_the_mean_of_squared_gradients(rng):
    """Of a linear classifier, whose gradient for one example is x (onehot - p); filling rows do not count."""
    w_DC = rng.normal(size=(3, 4)).astype(np.float32)
    table_ND = rng.normal(size=(5, 3)).astype(np.float32)
    some = examples([0, 3, 1, 1, 2])

    def log_p(params, batch):
        logits = jnp.asarray(table_ND)[jnp.asarray(batch.tokens_NT)[:, 0]] @ params
        return jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(batch.labels_N)[:, None], axis=1)[:, 0]

    p_NC = np.exp(table_ND @ w_DC)
    p_NC /= p_NC.sum(axis=1, keepdims=True)
    grads = np.einsum("nd,nc->ndc", table_ND, np.eye(4)[some.labels_N] - p_NC)
    found = fisher(log_p)(jnp.asarray(w_DC), filled(some, 2))
    np.testing.assert_allclose(found, (grads**2).mean(axis=0), rtol=1e-4, atol=1e-6)


def test_reservoir_is_uniform():
    """Each of 40 examples is among 10 with probability 1/4, whatever its place; five standard errors."""
    times, batches = 2000, [examples(range(begin, begin + 8)) for begin in range(0, 40, 8)]
    counts, rng = np.zeros(40), np.random.default_rng(0)
    for _ in range(times):
        buffer = baselines.reservoir(10, batches[0])
        for batch in batches:
            buffer = add(buffer, batch, rng)
        assert buffer.held.size == 10 and buffer.seen == 40 and len(set(buffer.held.labels_N)) == 10
        counts[buffer.held.labels_N] += 1
    assert np.abs(counts / times - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / times)


def test_reservoir_keeps_rows_together_and_leaves_the_old_one_alone():
    rng = np.random.default_rng(0)
    first = add(baselines.reservoir(3, examples([0])), examples([0, 1]), rng)
    assert first.held.labels_N.tolist() == [0, 1] and first.seen == 2
    second = add(first, examples(range(20)), rng)
    assert first.held.labels_N.tolist() == [0, 1] and second.held.size == 3
    assert (second.held.tokens_NT[:, 0] == second.held.labels_N).all()
    drawn = draw(second, 50, rng)
    assert set(drawn.labels_N) == set(second.held.labels_N) and drawn.weights_N.tolist() == [1.0] * 50
    assert draw(baselines.reservoir(3, drawn), 4, rng).weights_N.tolist() == [0.0] * 4


def test_replay_reads_as_many_old_examples_as_new_ones():
    met = []

    def read(state, batch):
        met.append(batch)
        return state, 0.0

    inner = Learner(lambda: None, read, lambda state, task: state, lambda state, batch: batch.labels_N)
    learner = replay(inner, capacity=5, seed=0)
    state = learner.init()
    for batch in filled(examples([0, 1, 2, 3, 4, 5]), 4):
        state, _ = learner.read(state, batch)
    assert [len(batch.labels_N) for batch in met] == [8, 8]
    assert met[0].weights_N.tolist() == [1.0] * 4 + [0.0] * 4
    assert met[1].labels_N[:2].tolist() == [4, 5] and met[1].weights_N.tolist() == [1, 1, 0, 0, 1, 1, 1, 1]
    assert set(met[1].labels_N[4:]) <= {0, 1, 2, 3} and state.buffer.seen == 6 and state.buffer.held.size == 5


def test_nearest_means(rng):
    """Classes that a direction of little spread tells apart, beside one of much; a class never seen is not said."""
    labels_N = rng.integers(2, size=400)
    x_ND = np.stack([10 * rng.normal(size=400), 0.1 * rng.normal(size=400) + labels_N], axis=1)
    found = baselines.statistics(3, 2)
    for begin in range(0, 400, 50):
        found = observe(found, x_ND[begin : begin + 50], labels_N[begin : begin + 50])
    mean_CD = np.stack([x_ND[labels_N == c].mean(axis=0) for c in (0, 1)])
    want_N = ((x_ND[:, None] - mean_CD) ** 2).sum(axis=-1).argmin(axis=1)
    assert (nearest_mean(found, x_ND) == want_N).all() and (want_N == labels_N).mean() < 0.9
    assert (discriminant(found, x_ND) == labels_N).mean() > 0.99


def test_votes():
    cosine = np.array([[0.9, 0.2, 0.3, 0.4], [0.8, 0.5, 0.7, -1.0]])
    assert vote(cosine, np.array([0, 1, 1, 1]), 2, 1).tolist() == [0, 0]
    assert vote(cosine, np.array([0, 1, 1, 1]), 2, 3).tolist() == [1, 1]
    assert vote(cosine, np.array([1, 0, 0, 0]), 2, 2).tolist() == [1, 1], "one vote each: the greater cosine"
    assert vote(cosine[:, :1], np.array([1]), 2, 5).tolist() == [1, 1]


@pytest.fixture(scope="module")
def model():
    """A small one with two CMS levels, and its parameters with a random head for four classes."""
    config = ModelConfig(name="hope_attention", dim=8, heads=2, layers=1, cms_hidden=(8, 8), tie_embeddings=False)
    params = build_lm(config).init(jax.random.key(0))
    head_DC = jax.random.normal(jax.random.key(1), (8, 4))
    assert with_classes(params, 4)["head"].shape == head_DC.shape
    return network(config, as_it_is(8)), {**params, "head": head_DC}


def test_a_text_is_represented_by_its_bytes_alone(model):
    """Padding changes nothing, a byte does; logits are the head on the representation."""
    net, params = model
    data = Labelled(["ab", "ab", "ac"], np.zeros(3, int))
    short, padded = net.represent(params, encode(data, 3)), net.represent(params, encode(data, 6))
    np.testing.assert_allclose(short, padded, atol=1e-5)
    np.testing.assert_allclose(short[0], short[1], atol=1e-6)
    assert np.abs(short[0] - short[2]).max() > 1e-3
    logits = net.logits(params, encode(data, 3))
    np.testing.assert_allclose(logits, np.asarray(short) @ np.asarray(params["head"]), atol=1e-5)


def test_classes_that_a_batch_does_not_have_are_left_alone(model):
    """Their columns of the head stay; filling rows change nothing, of the loss or of the parameters."""
    net, params = model
    data = encode(Labelled(["ab", "cd", "e"], np.array([1, 3, 1])), 4)
    [full], [padded] = filled(data, 3), filled(data, 5)
    learner = gradient(net, params, optax.sgd(1.0), batch_size=3)
    (state, value), (other, same) = (learner.read(learner.init(), batch) for batch in (full, padded))
    moved = np.abs(state.params["head"] - params["head"]).max(axis=0)
    assert (moved[[0, 2]] == 0).all() and (moved[[1, 3]] > 1e-4).all()
    logits_NC = np.asarray(net.logits(params, full))[:, [1, 3]]
    want = np.log(np.exp(logits_NC).sum(axis=1)) - logits_NC[range(3), [0, 1, 0]]
    assert value == pytest.approx(want.mean(), rel=1e-5) and same == pytest.approx(value, rel=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), state.params, other.params)


def test_ewc_pulls_back_to_where_the_last_task_ended(model):
    """Before a task has ended it is plain descent; then the gradient has strength F (theta - theta*)."""
    net, params = model
    data = encode(Labelled(["ab", "cd", "e"], np.array([1, 3, 1])), 4)
    [batch] = filled(data, 3)
    plain = gradient(net, params, optax.sgd(0.1), batch_size=3)
    ewc = gradient(net, params, optax.sgd(0.1), batch_size=3, strength=5.0)
    first, _ = plain.read(plain.init(), batch)
    held, _ = ewc.read(ewc.init(), batch)
    jax.tree.map(np.testing.assert_array_equal, first.params, held.params)
    held = ewc.finish(held, data)
    moved = held._replace(params=jax.tree.map(lambda leaf: leaf + 0.01, held.params))
    after, _ = ewc.read(moved, batch)
    want, _ = plain.read(first._replace(params=moved.params), batch)
    weight = held.anchor.fisher
    assert max(float(leaf.max()) for leaf in jax.tree.leaves(weight)) > 1e-3
    pulled = jax.tree.map(lambda w, f: w - 0.1 * 5.0 * f * 0.01, want.params, weight)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), after.params, pulled)


def test_adapting_learns_the_bytes_and_counts_examples_as_they_were(model):
    net, params = model
    params = {**params, "head": jax.random.normal(jax.random.key(1), (8, 256)) / 10}
    data = encode(Labelled(["abab", "baba"] * 4, np.array([1, 3] * 4)), 5)
    learner = adapting(net, params, optax.adam(1e-2), 4, discriminant)
    state, losses = learner.init(), []
    for _ in range(20):
        state, value = learner.read(state, data)
        losses.append(value)
    first, _ = learner.read(learner.init(), data)
    want = observe(baselines.statistics(4, 8), np.asarray(net.represent(params, data)), data.labels_N)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), first.seen, want)
    assert losses[-1] < 0.9 * losses[0] and state.seen.count_C.tolist() == [0, 80, 0, 80]


def test_each_level_is_written_at_its_clock(model):
    """The head at every batch, level 0 at every second, level 1 at every fourth, the rest never."""
    _, params = model
    [cell] = cells(TINY)
    tx = written_every({"head": 1, "level_0": 2, "level_1": 4}, cell, params)
    state, marks, update = tx.init(params), labels(params), jax.jit(tx.update)
    for step in range(1, 9):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = update(grads, state, params)
        moved = {mark: False for mark in ("head", "level_0", "level_1", "base")}
        for mark, leaf in zip(jax.tree.leaves(marks), jax.tree.leaves(updates), strict=True):
            moved[mark] |= bool(np.any(np.asarray(leaf)))
        due = {"head": True, "level_0": step % 2 == 0, "level_1": step % 4 == 0, "base": False}
        assert moved == due


# --- the matrix -------------------------------------------------------------------------------------------------------


def test_forgetting_is_what_was_best_minus_what_is_left():
    """Task 0 was best after task 1, task 1 when it was learned; the last has nothing to forget."""
    found = summary([[0.5], [0.75, 1.0], [0.25, 0.5, 0.75]])
    assert found == {"accuracy": 0.5, "forgetting": 0.5}
    assert summary([[0.25, 0.75]]) == {"accuracy": 0.5}


def test_learn_tests_every_task_so_far():
    """A method that knows the classes of the last task alone forgets all before it."""

    def finish(state, task):
        return set(task.labels_N.tolist())

    def predict(state, batch):
        return np.where(np.isin(batch.labels_N, list(state)), batch.labels_N, -1)

    knows_the_last = Learner(set, lambda state, batch: (state, 0.0), finish, predict)
    tasks = [examples([0, 1, 0]), examples([2, 3, 2, 3, 3])]
    cell = dataclasses.replace(TINY, batch_size=2)
    told = []
    found = learn(knows_the_last, Stream(tasks, tasks, 4), cell, lambda *row: told.append(row))
    assert [step for step, _ in found.curve] == [2, 5] and found.steps == 5 and told == found.curve
    assert found.curve[0][1] == {"task_1": 1.0}
    assert found.scores == {"accuracy": 0.5, "forgetting": 1.0, "task_1": 0.0, "task_2": 1.0}
    assert accuracy(knows_the_last, {0}, tasks[0], 2) == pytest.approx(2 / 3)


def test_a_loss_that_is_not_finite_ends_the_stream():
    losses = iter([1.0, float("nan")])
    learner = Learner(lambda: None, lambda state, batch: (state, next(losses)), lambda s, t: s, lambda s, b: b.labels_N)
    found = learn(learner, Stream([examples([0, 1, 2])], [], 3), dataclasses.replace(TINY, batch_size=1), print)
    assert found.failed == "not finite at step 2: loss nan" and found.scores == {}


def test_stream_of_a_cell():
    """All classes in the tasks of its order; joint training has one task and the same tests."""
    [cell] = cells(dataclasses.replace(TINY, test_examples=3))
    stream = stream_of(cell)
    assert [task.size for task in stream.tasks] == [32] * 3 and [test.size for test in stream.tests] == [6] * 3
    for task, test in zip(stream.tasks, stream.tests, strict=True):
        assert set(task.labels_N) == set(test.labels_N)
    joint = stream_of(dataclasses.replace(cell, methods=("joint",)))
    assert [task.size for task in joint.tasks] == [96]
    assert [test.labels_N.tolist() for test in joint.tests] == [test.labels_N.tolist() for test in stream.tests]


def test_records_and_pictures_show_the_matrix(tmp_path):
    """The whole command on the tiny data set; joint training has scores and no matrix."""
    options = dataclasses.replace(TINY, methods=("lda",), models=("transformer",), results=tmp_path)
    run("class_incremental", options, prepare, Console(quiet=True))
    [lda] = records.read_all(tmp_path)
    assert lda.model == "lda, transformer" and lda.failed is None
    assert [step for step, _ in lda.curve] == [2, 4, 6] and lda.steps == 6
    joint = dataclasses.replace(lda, model="joint", scores={"accuracy": 0.5}, curve=[(6, {"task_1": 0.5, "task_2": 1})])
    other = dataclasses.replace(lda, seed=1, options=lda.options | {"seeds": [1]})
    table = TABLES["class_incremental"]
    by_cell = table_cells([lda, other, joint], table)
    matrix = _matrix(by_cell["lda, transformer", "toy"][""])
    assert matrix.shape == (3, 3) and np.isnan(matrix[0, 1]) and not np.isnan(np.tril(matrix)).any()
    assert lda.scores["accuracy"] == pytest.approx(matrix[-1].mean())
    shown, spread = matrices(by_cell, table), with_spread(by_cell, table)
    assert [axes.get_title() for axes in shown.axes if axes.images] == ["toy\nlda, transformer"]
    np.testing.assert_allclose(shown.axes[0].images[0].get_array(), 100 * matrix)
    assert [len(axes.containers) for axes in spread.axes] == [2, 2]
    assert show(by_cell["joint", "toy"], table, "toy") == "50.0 / –"
    assert matrices(table_cells([joint], table), table) is not None


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="unknown data set 'clinc'; did you mean 'clinc150'"):
        IncrementalOptions(datasets=("clinc",))
    with pytest.raises(UserError, match="unknown method 'ewcc'; did you mean 'ewc'"):
        IncrementalOptions(methods=("ewcc",))
    with pytest.raises(UserError, match=r"clocks must be numbers of batches.*got \(1, 0\)"):
        IncrementalOptions(clocks=(1, 0))
    [cell] = cells(dataclasses.replace(TINY, models=("transformer",)))
    with pytest.raises(UserError, match="clocks needs a model with CMS levels, hope or hope_attention; transformer"):
        prepare(cell)
