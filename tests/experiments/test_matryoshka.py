"""Prefixes of a representation: the sentences, what is averaged, what is found, and a run."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import matryoshka, plots, records
from experiments.cells import table_cells
from experiments.intents import Labelled
from experiments.matryoshka import MatryoshkaOptions, labelled, lines, recall, some, texts_of, vectors
from experiments.published import PREFIXES, TABLES
from experiments.running import run
from hope_jax.training.errors import UserError

PAIRS = [[f"please {verb} number {i}", verb] for i in range(6) for verb in ("open", "close")]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "clinc150"
    path.mkdir()
    (path / "data_full.json").write_text(json.dumps({"train": PAIRS, "test": PAIRS[:4]}))
    (path / "domains.json").write_text(json.dumps({"all": ["open", "close"]}))
    return path


def test_both_kinds_of_folder(folder):
    other = folder.parent / "banking77"
    other.mkdir()
    for part, pairs in (("train", PAIRS), ("test", PAIRS[:4])):
        rows = "".join(f'"{text}",{label}\n' for text, label in pairs)
        (other / f"{part}.csv").write_text(f"text,category\n{rows}")
    one, two = labelled(folder), labelled(other)
    for mine, theirs in ((one.train, two.train), (one.test, two.test)):
        assert mine.texts == theirs.texts and mine.labels_N.tolist() == theirs.labels_N.tolist()
    with pytest.raises(UserError, match="neither a folder clinc150 nor banking77"):
        labelled(other / "nothing")


def test_text_is_every_training_sentence_once(folder):
    train, held_out = texts_of(str(folder))
    both = (train.tobytes() + held_out.tobytes()).decode().splitlines()
    assert sorted(both) == sorted(text for text, _ in PAIRS)
    assert held_out.tobytes().count(b"\n") == 2  # the last tenth of twelve, rounded up


def test_some_takes_as_many_of_each_label():
    found = some(Labelled(list("abcde"), np.array([0, 1, 0, 0, 1])), 2)
    assert found.texts == ["a", "c", "b", "e"] and found.labels_N.tolist() == [0, 0, 1, 1]


def test_vectors_are_means_over_the_bytes_of_a_sentence():
    """With a representation that is the byte and its square; long sentences are cut, short ones not padded."""
    texts = ["ab", "a much longer sentence", "c"] * 20
    found = vectors(lambda tokens: jnp.stack([tokens, tokens**2], axis=-1).astype(jnp.float32), texts, 8)
    assert found.shape == (60, 2)
    for row, one in zip(found, texts, strict=True):
        read = np.array(list(f"\n{one}\n".encode()[:8]), float)
        np.testing.assert_allclose(row, [read.mean(), (read**2).mean()], rtol=1e-6)
    assert lines(["ab", "c"]).tobytes() == b"ab\nc\n"


def test_recall_is_by_direction():
    searched, labels = np.array([[1.0, 0.0], [0.0, 5.0]]), np.array(["x", "y"])
    wanted = np.array([[9.0, 8.0], [0.1, 0.2]])  # the first is nearer to y by length, to x by direction
    assert recall(searched, labels, wanted, np.array(["x", "y"])) == 1.0


def test_run_and_picture(folder, tmp_path):
    options = dataclasses.replace(matryoshka.TINY, data=str(folder), per_intent=2, sentence=16, results=tmp_path / "r")
    run("matryoshka", options, matryoshka.prepare, Console(quiet=True))
    [record] = records.read_all(tmp_path / "r")
    table = TABLES["matryoshka"]
    assert record.model == "matryoshka" and tuple(record.scores) == table.scores and len(PREFIXES) == 4
    paths = plots.draw("matryoshka", table_cells([record], table), table, tmp_path / "plots")
    assert [path.name for path in paths] == ["matryoshka.png", "matryoshka_width.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_refusals():
    with pytest.raises(UserError, match="head 'matrioshka'; did you mean 'matryoshka'"):
        MatryoshkaOptions(heads=("matrioshka",))
    with pytest.raises(UserError, match="do not fit dim=20"):
        matryoshka.prepare(dataclasses.replace(matryoshka.TINY, dim=20, head_width=10, models=("transformer",)))
