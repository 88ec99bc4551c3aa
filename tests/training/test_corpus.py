"""The embedded corpus: the same every time, and nothing of validation in training."""

import numpy as np
import pytest

from hope_jax.training.corpus import (
    MIN_SHARED_PARAGRAPH,
    TRAIN_CODE_BYTES,
    VALIDATION_CODE_BYTES,
    VALIDATION_PROSE_BYTES,
    Document,
    embedded_corpus,
    file_corpus,
    join,
    source_documents,
    split_documents,
    topic_documents,
)
from hope_jax.training.errors import UserError


@pytest.fixture(scope="module")
def corpus():
    return embedded_corpus()


def test_sizes_are_bounded_and_filled(corpus):
    bound = VALIDATION_PROSE_BYTES + VALIDATION_CODE_BYTES
    assert 0.8 * bound < corpus.validation.size <= bound + 100  # newlines between documents
    assert corpus.train.size <= TRAIN_CODE_BYTES + 600_000
    assert corpus.train.size > 10 * corpus.validation.size


def test_both_halves_hold_prose_and_code(corpus):
    for half in (corpus.train, corpus.validation):
        text = half.tobytes().decode()
        assert "    def __init__(self" in text
        assert "expression" in text and "statement" in text


def test_same_every_time(corpus):
    again = embedded_corpus()
    assert again.sha256 == corpus.sha256
    np.testing.assert_array_equal(again.train, corpus.train)


def test_no_validation_paragraph_of_the_reference_occurs_in_training():
    train, validation = split_documents(topic_documents(), VALIDATION_PROSE_BYTES)
    seen = {block.strip() for document in train for block in document.text.decode().split("\n\n")}
    held_out = [block.strip() for document in validation for block in document.text.decode().split("\n\n")]
    telling = [block for block in held_out if len(block) >= MIN_SHARED_PARAGRAPH]
    assert len(telling) > 50
    assert not seen.intersection(telling)


def test_topics_that_share_a_paragraph_are_one_document():
    shared = "a paragraph that is long enough to say where the text comes from, and then some more"
    topics = {"a": f"first\n\n{shared}", "b": f"{shared}\n\nsecond", "c": "quite another topic"}
    documents = topic_documents(topics)
    assert sorted(len(document.text.split(b"\n\n")) for document in documents) == [1, 3]
    assert sum(document.text.count(shared.encode()) for document in documents) == 1


def test_split_by_file_is_disjoint_and_ignores_order():
    documents = source_documents()
    train, validation = split_documents(documents, VALIDATION_CODE_BYTES, TRAIN_CODE_BYTES)
    assert not {d.name for d in train} & {d.name for d in validation}
    assert not {d.text for d in train} & {d.text for d in validation}
    assert split_documents(documents[::-1], VALIDATION_CODE_BYTES, TRAIN_CODE_BYTES) == (train, validation)


def test_sources_name_no_machine_and_no_tests():
    names = [document.name for document in source_documents()]
    assert not [name for name in names if name.startswith("/") or "_sysconfigdata" in name or "/test" in name]
    assert "pydoc_data/topics.py" not in names  # it is the prose


def test_documents_are_never_cut():
    documents = [Document(f"d{i}", bytes([65 + i]) * 10) for i in range(9)]
    train, validation = split_documents(documents, 25, 40)
    assert [len(d.text) for d in validation] == [10, 10] and [len(d.text) for d in train] == [10] * 4
    assert join(validation).size == 21


def test_no_sources(tmp_path):
    with pytest.raises(UserError, match="data=FILE"):
        source_documents(tmp_path)


def test_file_corpus_holds_out_the_end(text_file):
    corpus = file_corpus(text_file)
    whole = text_file.read_bytes()
    assert corpus.train.tobytes() + corpus.validation.tobytes() == whole
    assert corpus.validation.size == len(whole) // 10
    assert corpus.seen_bytes == sorted(set(corpus.train.tobytes()))


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (None, "no such file"),
        (b"", "is empty"),
        (b"\x7fELF\0\0\0", "looks binary"),
        (b"caf\xe9", "iconv"),
    ],
)
def test_bad_files(tmp_path, content, remedy):
    path = tmp_path / "data.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=remedy) as caught:
        file_corpus(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_directory_as_file(tmp_path):
    with pytest.raises(UserError, match="is a directory"):
        file_corpus(tmp_path)
