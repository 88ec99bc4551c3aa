"""Sources: every format gives the same tokens, once; mistakes name the file and the remedy."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hope_jax.training import distributed
from hope_jax.training import ingest as module
from hope_jax.training.cache import cache_dir
from hope_jax.training.errors import UserError
from hope_jax.training.ingest import ingest
from hope_jax.training.sources import parse_sources, read_pieces
from hope_jax.training.vocabulary import load_vocabulary

TEXTS = [f"document {i}\nis {'long ' * (i % 7)}é" for i in range(200)]
BYTES = load_vocabulary("bytes")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOPE_JAX_CACHE", str(tmp_path / "cache"))


def write(path, texts=TEXTS, column="text"):
    table = pa.table({"id": list(range(len(texts))), column: texts})
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    elif path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        path.mkdir()
        for i, text in enumerate(texts):
            (path / f"{i:05}.txt").write_text(text)
    return str(path)


def documents(corpus, half="train"):
    tokens, starts = getattr(corpus, half), getattr(corpus, f"{half}_starts")
    return [bytes(part) for part in np.split(np.asarray(tokens), starts[1:])]


def test_every_format_gives_the_same_documents(tmp_path):
    names = ["a.jsonl", "b.parquet", "c.arrow"]
    found = [ingest(write(tmp_path / name), "text", BYTES) for name in names]
    found.append(ingest(write(tmp_path / "folder", TEXTS[:20]), "text", BYTES))
    for corpus in found:
        texts = TEXTS if corpus is not found[-1] else TEXTS[:20]
        split = documents(corpus) + documents(corpus, "validation")
        assert sorted(split) == sorted(text.encode() + b"\0" for text in texts)
        assert corpus.bytes("train") == corpus.train.size - len(documents(corpus))
    assert len({corpus.sha256 for corpus in found}) == 2
    assert isinstance(found[0].train, np.memmap) and 0 < found[0].validation.size < found[0].train.size / 4


def test_the_split_is_by_document_and_ignores_order_and_copies(tmp_path):
    forward = ingest(write(tmp_path / "a.jsonl", TEXTS + TEXTS), "text", BYTES)
    backward = ingest(write(tmp_path / "b.jsonl", TEXTS[:1] + TEXTS[::-1]), "text", BYTES)
    assert set(documents(forward, "validation")) == set(documents(backward, "validation"))
    assert not set(documents(forward)) & set(documents(forward, "validation"))


def test_no_document_is_held_out_beyond_the_bound_but_copies_of_one_that_is(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "VALIDATION_TOKENS", 1)
    corpus = ingest(write(tmp_path / "a.jsonl", TEXTS + TEXTS), "text", BYTES)
    held_out = documents(corpus, "validation")
    assert len(held_out) == TEXTS.count(held_out[0][:-1].decode()) * 2 and len(set(held_out)) == 1


@pytest.mark.parametrize(
    ("texts", "held_out"), [(["one " * 20], b"e one \0"), (["first " * 30, "second"], b"second\0")]
)
def test_something_is_always_held_out(tmp_path, texts, held_out):
    corpus = ingest(write(tmp_path / "a.jsonl", texts), "text", BYTES)
    assert documents(corpus, "validation") == [corpus.validation.tobytes()]
    assert corpus.validation.tobytes().endswith(held_out)
    assert corpus.train.tobytes() + corpus.validation.tobytes() == b"".join(text.encode() + b"\0" for text in texts)
    assert corpus.bytes("train") + corpus.bytes("validation") == sum(map(len, texts))


def test_read_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    said = []
    name = write(tmp_path / "a.jsonl")
    first = ingest(name, "text", BYTES, said.append)
    assert len(said) == 1 and name in said[0]
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_pieces", lambda *args: pytest.fail("read again"))
        assert ingest(name, "text", BYTES, said.append).sha256 == first.sha256
    write(tmp_path / "a.jsonl", [*TEXTS, "more"])
    assert ingest(name, "text", BYTES, said.append).sha256 != first.sha256
    assert len(said) == 2


@pytest.mark.parametrize("shared", [True, False])
def test_a_process_that_is_not_the_first_waits_for_the_one_that_is(tmp_path, monkeypatch, shared):
    """While it waits the first reads, into the same cache or not; then it has nothing left to do, or all."""
    name, said, ours = write(tmp_path / "a.jsonl"), [], cache_dir()

    def meanwhile(*_):
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "is_first_at", lambda place: True)
            patch.setattr(distributed, "barrier", lambda *_: None)
            patch.setenv("HOPE_JAX_CACHE", str(ours if shared else tmp_path / "other"))
            ingest(name, "text", BYTES, lambda line: said.append("first"))

    monkeypatch.setattr(distributed, "is_first_at", lambda place: False)
    monkeypatch.setattr(distributed, "barrier", meanwhile)
    corpus = ingest(name, "text", BYTES, lambda line: said.append("ours"))
    assert said == (["first"] if shared else ["first", "ours"])
    assert len(documents(corpus)) + len(documents(corpus, "validation")) == len(TEXTS)
    assert len(list(ours.iterdir())) == 1


def test_a_reading_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": }\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: not JSON"):
        ingest(str(tmp_path / "a.jsonl"), "text", BYTES)
    assert not list(cache_dir().iterdir())


def test_long_texts_arrive_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("hope_jax.training.sources.BLOCK", 100)
    text = "".join(f"line {i}\n" for i in range(500))
    (tmp_path / "a.txt").write_text(text)
    pieces = list(read_pieces(str(tmp_path / "a.txt"), "text"))
    assert len(pieces) > 20 and [piece.ends for piece in pieces].count(True) == 1 and pieces[-1].ends
    assert "".join(piece.text for piece in pieces) == text


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_tokenizer_file(tmp_path, tokenizer_file):
    words = load_vocabulary(str(tokenizer_file))
    assert (words.size, words.dtype, words.end) == (300, np.uint16, 0)
    corpus = ingest(write(tmp_path / "a.jsonl"), "text", words)
    assert corpus.train.dtype == np.uint16
    parts = np.split(np.asarray(corpus.train), corpus.train_starts[1:])
    assert all(part[-1] == words.end for part in parts)
    kept = {words.decode(part[:-1].tolist()) for part in parts}
    assert kept < set(TEXTS) and len(kept) > 150
    assert corpus.bytes("train") > 1.5 * corpus.train.size


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), ("{}", "not a tokenizers JSON"), ("x", "not a tokenizers JSON")]
)
def test_a_tokenizer_file_that_is_none(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_vocabulary(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\nnope\n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"line 2: not UTF-8 text \(byte 0xE9\)"),
        ("a.jsonl", b"3\n", "line 1: int, not an object"),
        ("a.jsonl", b'{"body": "a"}\n', r"no column 'text'; there are: 'body'; choose with text_column="),
        ("a.jsonl", b'{"text": 3}\n', "row 1 holds int, not text"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.jsonl", b"", "is empty"),
        ("a.parquet", b"nope", "as parquet"),
        ("a.arrow", b"nope", "as arrow"),
        ("a.txt", b"caf\xe9", r"not UTF-8 text \(byte 0xE9\)"),
        ("a.xyz", b"text", r"unknown extension '\.xyz'; these can be read: \.jsonl"),
        (None, b"", "no such file: .*hub:NAME"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / (name or "none.jsonl")
    if name:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        ingest(str(path), "text", BYTES)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a.jsonl:-1,b.jsonl:2", "weight of a.jsonl is -1"),
        ("a.jsonl:nan", "weight of a.jsonl is nan"),
        ("a.jsonl:0,b.jsonl:0", "add up to zero"),
        ("", "names no source"),
    ],
)
def test_bad_weights(data, message):
    with pytest.raises(UserError, match=message):
        parse_sources(data)


def test_weights(tmp_path):
    assert [tuple(source) for source in parse_sources("a.jsonl:3, b*.txt:0, hub:x/y@z:1")] == [
        ("a.jsonl", 3.0),
        ("hub:x/y@z", 1.0),
    ]
    odd = tmp_path / "a,b:3"
    odd.write_text("text")
    assert [tuple(source) for source in parse_sources(str(odd))] == [(str(odd), 1.0)]  # a file that is there


def test_a_hub_name_without_a_network(monkeypatch):
    import datasets

    def unreachable(*args, **options):
        raise ConnectionError("Couldn't reach 'x/y' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"cannot read hub:x/y .*check the name and the network") as caught:
        ingest("hub:x/y", "text", BYTES)
    assert "\n" not in str(caught.value)
