"""Stories against a replay of their own, documents byte by byte, and memory while a long one goes by."""

import dataclasses
import itertools
import re
import tracemalloc

import numpy as np
import pytest

from experiments import babilong
from experiments.babi import FACTS, Story, make, read, source
from experiments.babilong import TINY, LongOptions, background, batch_of, document, exact, pieces, reply, stream
from experiments.options import cells
from hope_jax.training.errors import UserError

MOVE = r"(\w+) (?:went|went back|moved|journeyed|travelled) to the (\w+)"
TAKE = r"(\w+) (?:took|got|grabbed|picked up) the (\w+)"
DROP = r"(\w+) (?:dropped|left|put down|discarded) the (\w+)"
LINES = background(np.frombuffer(b"first line of the background\n\n  second line\nthird\n" * 3, np.uint8))
STORY = Story(
    ("Anna went to the inn.", "Bruno went to the mill.", "Anna went to the attic."), "Where is Anna?", "attic"
)


def replay(facts, question):
    """The answer, from the places of everything after each fact; what is held is looked up in the past."""
    where, carried, history = {}, {}, []
    for fact in facts:
        if found := re.match(MOVE, fact):
            where[found[1]] = found[2]
        elif found := re.match(TAKE, fact):
            carried[found[2]] = found[1]
        elif found := re.match(DROP, fact):
            where[found[2]] = where.get(found[1])
            carried.pop(found[2])
        where |= {thing: where.get(person) for thing, person in carried.items()}
        history.append(dict(where))
    if found := re.match(r"Where is (?:the )?(\w+)\?", question):
        return history[-1][found[1]]
    [(thing, place)] = re.findall(r"Where was the (\w+) before the (\w+)\?", question)
    path = [place for place, _ in itertools.groupby(now.get(thing) for now in history)]
    last = len(path) - 1 - path[::-1].index(place)
    return path[last - 1]


@pytest.mark.parametrize("task", FACTS)
def test_answers_follow_from_the_facts(task):
    rng = np.random.default_rng(0)
    stories = [make(task, rng) for _ in range(500)]
    assert all(replay(story.facts, story.question) == story.answer for story in stories)
    assert all(FACTS[task][0] <= len(story.facts) <= FACTS[task][1] for story in stories)
    assert len({story.answer for story in stories}) == 6
    last = [story.answer == re.findall(r"to the (\w+)", " ".join(story.facts))[-1] for story in stories]
    assert np.mean(last) < 0.75  # the last place that is named is not simply the answer


def test_what_happens_is_possible():
    """Only what is here and free is taken, only what is held is dropped, nobody goes to where they are."""
    rng = np.random.default_rng(1)
    for _ in range(500):
        where, holder = {}, {}
        for fact in make("qa3", rng).facts:
            if found := re.match(MOVE, fact):
                assert where.get(found[1]) != found[2]
                where[found[1]] = found[2]
                where |= {thing: found[2] for thing, person in holder.items() if person == found[1]}
            elif found := re.match(TAKE, fact):
                assert found[2] not in holder and where.setdefault(found[2], where[found[1]]) == where[found[1]]
                holder[found[2]] = found[1]
            else:
                found = re.match(DROP, fact)
                assert found and holder.pop(found[2]) == found[1]


def test_files_of_the_data_set_are_read(tmp_path):
    path = tmp_path / "qa1_single_test.txt"
    path.write_text(
        "1 Mary moved to the hall.\n2 Where is Mary? \thall\t1\n3 John went to the mill.\n"
        "4 Where is John? \tmill\t3\n1 John moved to the inn.\n2 Where is John?\tinn\t1\n"
    )
    assert read(path) == [
        Story(("Mary moved to the hall.",), "Where is Mary?", "hall"),
        Story(("Mary moved to the hall.", "John went to the mill."), "Where is John?", "mill"),
        Story(("John moved to the inn.",), "Where is John?", "inn"),
    ]
    draw = source("qa1", str(tmp_path), "test", most=50)
    assert {draw(np.random.default_rng(seed)).answer for seed in range(20)} == {"hall", "inn"}
    with pytest.raises(UserError, match=r"no story of .* has 5 bytes or fewer; raise --length"):
        source("qa1", str(tmp_path), "test", most=5)
    with pytest.raises(UserError, match=r"no qa2_\*_test.txt in"):
        source("qa2", str(tmp_path), "test", most=50)
    path.write_text("Mary moved to the hall.\n")
    with pytest.raises(UserError, match="line 1 is not a line of bAbI: 'Mary moved"):
        read(path)


@pytest.mark.parametrize("length", [90, 91, 120, 1000, 4096])
def test_a_document_is_its_lines_in_order_and_as_long_as_asked(length):
    for seed in range(20):
        made = b"".join(document(STORY, LINES, length, np.random.default_rng(seed)))
        assert len(made) == length and made.endswith(b"\nWhere is Anna? ")
        told = made.decode().split("\n")
        assert tuple(line for line in told if line in STORY.facts) == STORY.facts
        rest = [line for line in told[:-1] if line not in STORY.facts]
        whole = [line.decode().strip() for line in LINES]
        assert all(line in whole for line in rest[:-1]) and (not rest or any(w.startswith(rest[-1]) for w in whole))


def test_facts_lie_anywhere():
    """The middle fact of three has its place in the middle on average, within 5 standard errors."""
    made = [b"".join(document(STORY, LINES, 4096, np.random.default_rng(seed))) for seed in range(500)]
    places = np.array([one.index(b"Bruno") for one in made]) / 4096
    assert abs(places.mean() - 0.5) < 5 * np.sqrt(1 / 20 / 500) + 0.01  # a fact waits for the end of a line
    assert min(places) < 0.2 and max(places) > 0.8


def test_pieces_are_the_documents():
    whole = [b"".join(document(STORY, LINES, 1000, np.random.default_rng(seed))) for seed in (0, 1)]
    parts = list(pieces([document(STORY, LINES, 1000, np.random.default_rng(seed)) for seed in (0, 1)], 64))
    assert [part.shape for part in parts] == [(2, 64)] * 15 + [(2, 40)]
    assert [bytes(row.tolist()) for row in np.concatenate(parts, axis=1)] == whole


def test_a_document_is_never_whole_in_memory():
    """A million bytes go by in as much memory as ten thousand."""

    def peak(length):
        tracemalloc.start()
        count = sum(part.size for part in pieces([document(STORY, LINES, length, np.random.default_rng(0))], 256))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == length
        return most

    peak(10_000)
    assert peak(2**20) < peak(10_000) + 10_000 < 100_000


def test_training_documents_end_in_their_answers():
    rng = np.random.default_rng(0)
    stories = [make("qa2", rng) for _ in range(5)]
    batch = batch_of(stories, LINES, 512, rng)
    for story, tokens, targets, weights in zip(stories, *batch, strict=True):
        assert bytes(targets[weights == 1].tolist()) == reply(story) == f"{story.answer}\n".encode()
        assert bytes([tokens[0], *targets]).endswith(f"{story.question} {story.answer}\n".encode())


def test_an_answer_is_right_to_the_end_of_its_line():
    said = [b"attic\nxx", b"attics\nx", b"atti\nxxx"]
    assert exact(np.array([list(one) for one in said]), [STORY] * 3) == [True, False, False]


def test_streams_follow_the_seed_and_do_not_repeat():
    [cell] = cells(TINY)
    first, again, other = (stream(dataclasses.replace(cell, seeds=(seed,))) for seed in (0, 0, 1))
    batches = [next(first) for _ in range(5)]
    assert all((batch.tokens == next(again).tokens).all() for batch in batches)
    assert len({batch.tokens.tobytes() for batch in [*batches, next(other)]}) == 6


@pytest.mark.parametrize("task", FACTS)
def test_a_reader_who_replays_the_facts_is_right_at_every_length(task, monkeypatch):
    """The whole evaluation around one that picks the facts out of the text."""

    def say(_, params, pieces, count):
        del params
        texts = [bytes(row.tolist()).decode() for row in np.concatenate(list(pieces), axis=1)]
        facts = [
            [line for line in lines.split("\n") if re.fullmatch(rf"({MOVE}|{TAKE}|{DROP})\.", line)] for lines in texts
        ]
        said = [
            f"{replay(found, lines.split(chr(10))[-1])}\n".encode() for found, lines in zip(facts, texts, strict=True)
        ]
        return np.array([list(one.ljust(count)) for one in said])

    monkeypatch.setattr(babilong, "answers", say)
    [cell] = cells(dataclasses.replace(TINY, tasks=(task,), length=512, longest="16K", test_documents=8))
    assert babilong.prepare(cell).evaluate(None) == {"exact_train": 1.0, "exact_4K": 1.0, "exact_16K": 1.0}
    cached = dataclasses.replace(cell, models=("transformer",), cache=5000)
    assert babilong.prepare(cached).evaluate(None) == {"exact_train": 1.0, "exact_4K": 1.0}


def test_lengths_are_those_up_to_the_longest():
    assert LongOptions(longest="64K").lengths() == {"train": 512, "4K": 4096, "16K": 16_384, "64K": 65_536}
    assert LongOptions(longest="train").lengths() == {"train": 512}


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="unknown length '2M'"):
        LongOptions(longest="2M")
    with pytest.raises(UserError, match="cache must hold a training document of 512 bytes; got 100"):
        LongOptions(cache=100)
    with pytest.raises(UserError, match="test_documents must be at least 1; got 0"):
        LongOptions(test_documents=0)
    with pytest.raises(UserError, match="qa9 needs the files of bAbI: give their folder with --babi"):
        source("qa9", None, "test", 100)
