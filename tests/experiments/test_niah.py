"""Needles against a reader that looks the question up with regular expressions."""

import dataclasses
import re

import numpy as np
import pytest

from experiments import niah, text
from experiments.needles import TASKS, document
from experiments.niah import TINY, HeldOut, NeedleOptions, batch_of, held_out, score, stream
from experiments.options import cells
from hope_jax.training.errors import UserError

ESSAY = np.frombuffer(b"some words that stand for an essay, one after the other, " * 40, np.uint8)
VALUE = {"number": r"\d{7}", "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"}


def draw(name, count=30, length=300, digits=7):
    rng = np.random.default_rng(0)
    return [document(TASKS[name], rng, ESSAY, length, digits) for _ in range(count)]


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_is_what_the_text_says(name):
    task = TASKS[name]
    for one in draw(name):
        assert len(one.prompt + one.answer) == 300
        found = re.findall(rf"The pass-code of (\w+) is ({VALUE[task.value]})\. ", one.prompt.decode())
        [question] = re.findall(r"\nWhat (?:is|are) the pass-codes? of ([\w, ]+)\? $", one.prompt.decode())
        asked = question.split(", ")
        assert len(found) == task.names * task.values and len({owner for owner, _ in found}) == task.names
        assert len(set(asked)) == task.queries and set(asked) <= {owner for owner, _ in found}
        answer = [value for name in asked for owner, value in found if owner == name]
        assert " ".join(answer).encode() == one.answer


def test_needles_lie_anywhere_and_the_first_is_not_always_asked():
    """The share of the filler's spaces before the needle is even over [0, 1]: mean and variance, 5 standard errors."""
    before = []
    for one in draw("S-NIAH-2", count=2000, length=400):
        head, tail = re.split(rb"The pass-code of \w+ is \d+\. ", one.prompt.split(b"\n")[0])
        before.append(head.count(b" ") / (head + tail).count(b" "))
    assert abs(np.mean(before) - 0.5) < 5 * np.sqrt(1 / 12 / 2000)
    assert abs(np.var(before) - 1 / 12) < 5 * np.sqrt(1 / 180 / 2000) + 1 / 60  # of 40 to 60 places
    first = [one.prompt.index(one.values[0]) == one.prompt.index(b" is ") + 4 for one in draw("MK-NIAH-1", 400)]
    assert abs(np.mean(first) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 400)


def test_noise_is_whole_sentences_around_the_needle():
    for one in draw("S-NIAH-1"):
        rest = re.sub(rb"The pass-code of \w+ is \d+\. ", b"", one.prompt.split(b"\n")[0])
        assert rest.startswith(b"Rain fell on the hills. ") and b"pass" not in rest
        before = one.prompt[: one.prompt.index(b"The pass-code")]
        assert before == b"" or before.endswith(b". ")


def test_essay_filler_of_the_embedded_text_hides_nothing_by_itself():
    corpus = text.corpus("embedded")
    assert b"pass-code" not in corpus.train.tobytes() + corpus.validation.tobytes()


def test_only_the_answer_has_weight():
    made = draw("MV-NIAH", count=5)
    batch = batch_of(made)
    for one, tokens, targets, weights in zip(made, *batch, strict=True):
        assert bytes(tokens[:1].tolist() + targets.tolist()) == one.prompt + one.answer
        assert bytes(targets[weights == 1].tolist()) == one.answer
        assert set(weights) == {0.0, 1.0}


def test_scores_are_counted_as_a_loop_counts_them():
    """Two values of two characters and a space: one answer right, one with a wrong digit in its second value."""
    answers = np.frombuffer(b"12 3445 67", np.uint8).reshape(2, 5)
    said = np.frombuffer(b"12 3445 68", np.uint8).reshape(2, 5)
    tests = HeldOut(np.zeros((2, 1)), answers, [slice(0, 2), slice(3, 5)])
    assert score(said, tests) == {"values": 0.75, "exact": 0.5, "characters": 0.9}
    assert set(score(answers, tests).values()) == {1.0}


@pytest.mark.parametrize("name", TASKS)
def test_values_stand_where_the_scores_look_for_them(name):
    cell = dataclasses.replace(TINY, tasks=(name,), length=300, digits=7)
    tests = held_out(cell, 300)
    task = TASKS[name]
    assert len(tests.values) == task.queries * task.values
    for answer in tests.answers_BA:
        assert [bytes(answer[place]) for place in tests.values] == bytes(answer).split(b" ")


@pytest.mark.parametrize("name", TASKS)
def test_a_reader_who_looks_it_up_is_right_at_every_length(name, monkeypatch):
    """The whole evaluation around one that searches the text."""

    def say(_, params, pieces, count):
        del params
        said = []
        for row in np.concatenate(list(pieces), axis=1):
            haystack, _, question = bytes(row.tolist()).rpartition(b"\n")
            found = re.findall(rb"The pass-code of (\w+) is ([\w-]+)\. ", haystack)
            asked = re.split(rb", ", question[question.index(b" of ") + 4 : -2])
            said.append(b" ".join(value for name in asked for owner, value in found if owner == name))
        assert {len(one) for one in said} == {count}
        return np.array([list(one) for one in said])

    monkeypatch.setattr(niah, "answers", say)
    [cell] = cells(dataclasses.replace(TINY, tasks=(name,), length=300))
    scores = niah.prepare(cell).evaluate(None)
    assert len(scores) == 9 and set(scores.values()) == {1.0}


def test_streams_follow_the_seed_and_do_not_repeat():
    [cell] = cells(TINY)
    first, again, other = (stream(dataclasses.replace(cell, seeds=(seed,))) for seed in (0, 0, 1))
    batches = [next(first) for _ in range(5)]
    assert all((batch.tokens == next(again).tokens).all() for batch in batches)
    assert len({batch.tokens.tobytes() for batch in [*batches, next(other)]}) == 6


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="unknown task 'S-NIAH-4'; did you mean"):
        NeedleOptions(tasks=("S-NIAH-4",))
    with pytest.raises(UserError, match="digits must lie between 1 and 18; got 0"):
        NeedleOptions(digits=0)
    with pytest.raises(UserError, match="test_documents must be at least 1; got 0"):
        NeedleOptions(test_documents=0)
    with pytest.raises(UserError, match=r"length 100 leaves -?[0-9]+ bytes of filler"):
        draw("MV-NIAH", length=100)
    with pytest.raises(UserError, match="the text has 2280 bytes, a haystack needs"):
        draw("S-NIAH-2", length=3000)
