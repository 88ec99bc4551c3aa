"""Pairs from hand-made files, prompts, greedy translation against a loop, and the chrF column by an oracle."""

import dataclasses
import functools
import gzip
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import streams, translation
from experiments.options import cells
from experiments.pairs import GENERATED_LANGUAGES, aligned, between, parallel, text_of
from experiments.training import language_model
from experiments.translation import TINY, TranslationOptions, chrf, prepare, questions, translator
from hope_jax.training.errors import UserError

FILES = {"train.en": "one\ntwo  words\n\nthree\n", "train.de": "eins\nzwei\tWörter\nnichts\ndrei\n"}
FILES |= {"train.fr": "un\r\ndeux mots\r\nrien\r\ntrois\r\n"}
LANGUAGES = ("en", "de", "fr")
PAIRS = [("a", "eins"), ("b", "zwei"), ("c", "ö"), ("d" * 40, "long")]


def write(folder, files):
    for name, content in files.items():
        data = content.encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


def test_lines_that_belong_together(tmp_path):
    """Plain or packed; a line that is empty in one language is left out of all; spaces are single, tabs none."""
    write(
        tmp_path, {**FILES, **{f"{stem}.{end}.gz": stem for stem in ("val", "test_b", "test_a") for end in LANGUAGES}}
    )
    found = parallel(str(tmp_path), LANGUAGES)
    assert found.train == [("one", "eins", "un"), ("two words", "zwei Wörter", "deux mots"), ("three", "drei", "trois")]
    assert found.test == [("test_a",) * 3]
    assert bytes(text_of(between(found.train[1:], 1))).decode() == "two words\tzwei Wörter\nthree\tdrei\n"


def test_without_test_files_val_is_held_out(tmp_path):
    write(tmp_path, {**FILES, **{f"val.{end}": "held out" for end in LANGUAGES}})
    assert parallel(str(tmp_path), LANGUAGES).test == [("held out",) * 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.de": None}, "no train.de or train.de.gz in .*--languages"),
        ({"train.fr": "un\n"}, "train.en has 4 lines and train.fr 1; line i"),
        ({"train.en": "\n"}, "train.en is empty"),
        ({"train.en": b"\xff\n"}, "train.en is not UTF-8"),
        ({"train.en": None, "train.en.gz": b"plain"}, "cannot read .*train.en.gz: Not a gzipped file"),
        ({"train.en": None, "train.en.gz": gzip.compress(b"one\n")[:-9]}, "cannot read .*train.en.gz"),
        ({"train.en": "\n\n\na\n", "train.de": "a\n\n\n\n"}, "no line of train.en, train.de, train.fr has words"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path, changes, message):
    for name, content in {**FILES, **changes}.items():
        if content is not None:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        aligned(tmp_path, "train", LANGUAGES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"languages": ("en", "de")}, r"languages are three.*got \['en', 'de'\]"),
        ({"languages": ("en", "de", "de")}, r"languages are three.*got \['en', 'de', 'de'\]"),
        ({"data": ("a", "b")}, r"data is one folder.*got \['a', 'b'\]"),
        ({"shots": -1}, "shots must be at least 0; got -1"),
    ],
)
def test_what_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        TranslationOptions(**changes)


def test_generated_languages_have_no_files():
    with pytest.raises(UserError, match="--languages en de fr are ends of files"):
        parallel("generated", LANGUAGES)


def test_generated_sentences_mean_the_same():
    """One word of each language for each of the others; the second has them in the opposite order."""
    train, test = parallel("generated", GENERATED_LANGUAGES)
    for other, step in ((1, 1), (2, -1)):
        said = [(home.split(), to.split()[::step]) for home, to in between(train + test, other)]
        together = {(a, b) for home, to in said for a, b in zip(home, to, strict=True)}
        assert len(together) == len({a for a, _ in together}) == len({b for _, b in together}) == 24


def test_no_sentence_is_in_two_parts(tmp_path):
    train, test = parallel("generated", GENERATED_LANGUAGES)
    home = [sentence[0] for sentence in train + test]
    assert (len(train), len(test)) == (12_000, 500) and len(set(home)) == len(home)
    for language in LANGUAGES:
        (tmp_path / f"train.{language}").write_text("one\ntwo\none\n")
        (tmp_path / f"val.{language}").write_text("two\nthree\nthree\n")
    train, test = parallel(str(tmp_path), LANGUAGES)
    assert ([sentence[0] for sentence in train], [sentence[0] for sentence in test]) == (["one", "two"], ["three"])


def test_a_question_ends_with_its_sentence_and_a_tab():
    """Two of the examples in front, nothing before; pairs that are too long are neither asked nor shown."""
    cell = dataclasses.replace(TINY, length=30, shots=2, sentences=2)
    tokens, mask, answers = questions(PAIRS, PAIRS, cell)
    assert answers == ["eins", "ö"] and tokens.shape == mask.shape == (2, 30)
    for row, seen, home in zip(tokens, mask, "ac", strict=True):
        *examples, last = bytes(row[seen].tolist()).decode().split("\n")
        assert last == f"{home}\t" and len(set(examples)) == 2
        assert set(examples) <= {"\t".join(pair) for pair in PAIRS[:3]}
        assert (row[~seen] == 0).all() and (np.diff(seen.astype(int)) >= 0).all()
    with pytest.raises(UserError, match=r"3 held-out pairs and 3 examples have 10 bytes.*lower --sentences 4"):
        questions(PAIRS, PAIRS, dataclasses.replace(cell, sentences=4))


@pytest.mark.parametrize("name", ["transformer", "hope_attention"])
def test_translations_are_the_likeliest_bytes_one_after_the_other(name):
    """Against a loop that reads each prompt alone, without padding, from the start for each byte."""
    cell = dataclasses.replace(TINY, models=(name,), length=30, shots=2, sentences=2, learners=("none",))
    base = streams.configs(cell)[0]
    model = language_model(dataclasses.replace(base, max_length=60))
    params = jax.jit(model.init)(jax.random.key(0))
    params["head"] = jax.tree.map(lambda leaf: 30 * leaf, params["head"])  # so that bytes differ
    asked = questions(PAIRS, PAIRS, cell)
    apply = jax.jit(model.apply)
    expected = []
    for row, seen in zip(asked.tokens_NT, asked.mask_NT, strict=True):
        first, text = int(seen.sum()), np.zeros(60, np.int32)  # what comes later changes nothing
        text[:first] = row[seen]
        for end in range(first, first + cell.room):
            text[end] = np.asarray(apply(params, text[None]))[0, end - 1].argmax()
        expected.append(translation.until_the_line_ends(text[first : first + cell.room]))
    assert translator(base, cell)(params, asked) == expected and len(set(expected)) == 2


def test_the_column_of_chrf(monkeypatch):
    """An oracle that says what is asked for after the first language, and nothing after the second."""
    [cell] = cells(TINY)
    said = [True, False, True]  # first halfway, first in the end, second in the end

    def oracle(config, cell):
        return lambda params, asked: asked.answers if said.pop(0) else [""] * cell.sentences

    monkeypatch.setattr(translation, "translator", oracle)
    job = prepare(dataclasses.replace(cell, models=("transformer",)))
    found = job.evaluate(jax.jit(job.model.init)(jax.random.key(0)))
    assert [found[f"chrf_{name}"] for name in ("first_between", "first_end", "second_end")] == [1.0, 0.0, 1.0]
    assert {"bits_both", "bits_home_end", "bits_gained_at_0.1", "bits_second_alone"} <= set(found) and not said
    assert job.column == "generated, home → first → second"


def test_what_is_translated_was_learned(monkeypatch):
    """First after the first text, and both after both, by parameters of the best rate."""
    [cell] = cells(dataclasses.replace(TINY, models=("transformer",), rates=(0.0, 1.0)))
    seen = []

    def spy(config, cell):
        return lambda params, asked: seen.append(params) or asked.answers

    monkeypatch.setattr(translation, "translator", spy)
    job = prepare(cell)
    params = jax.jit(job.model.init)(jax.random.key(0))
    job.evaluate(params)
    distance = functools.partial(jax.tree.map, lambda a, b: float(jnp.abs(a - b).max()))
    halfway, end, again = (max(jax.tree.leaves(distance(params, one))) for one in seen)
    assert 0 < halfway != end == again


def test_chrf_is_a_share():
    metric = chrf()
    assert metric(["ein Haus", "été"], ["ein Haus", "été"]) == 1.0
    assert 0 < metric(["ein Hund", "été"], ["ein Haus", "été"]) < 1 and metric(["", ""], ["ein Haus", "été"]) == 0.0


def test_without_sacrebleu(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.chrf", None)
    with pytest.raises(UserError, match="pip install sacrebleu"):
        chrf()
