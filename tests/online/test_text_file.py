"""Texts from files and pipes, in bounded memory: what is read, refused and saved on the way."""

import io
import os
import pkgutil
import re
import threading
import tracemalloc
import types

import numpy as np
import pytest
from rich.console import Console

from hope_jax import online
from hope_jax.online.learn import learn_file, read_with_progress
from hope_jax.online.place import Snapshot
from hope_jax.online.stream import TOKENS_A_CALL
from hope_jax.online.text_file import check_text, file_pieces
from hope_jax.training.errors import UserError
from hope_jax.training.vocabulary import load_vocabulary

TEXT = "dös, \N{BLACK SQUARE} and \N{PARTY POPPER};\r\n" * 150  # more than two calls
SIZE = len(TEXT.encode())


@pytest.fixture
def session(config, params):
    return online.Session(config, params)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


def read(session, path, console=None):
    """Reports of a file that is read."""
    return list(read_with_progress(session, check_text(path), console or Console(file=io.StringIO())))


def test_a_file_is_its_text_to_the_bit(session, config, params, file):
    [report] = read(session, file)
    whole = online.Session(config, params)
    expected = whole.observe(TEXT)
    assert session.digest() == whole.digest()
    assert (report.tokens, report.held) == (SIZE, expected.held)
    assert report.before == pytest.approx(expected.before, rel=1e-6)
    assert report.chunks.losses.shape == (0, session.chunk_size)  # they are not kept
    assert len(report.chunks.before) == len(expected.chunks.before)


def test_the_first_byte_that_is_not_utf8_is_named(tmp_path, monkeypatch):
    """Wherever blocks end."""
    monkeypatch.setattr("hope_jax.online.text_file.BLOCK", 3)
    for content in (
        b"\xff",
        b"ab\xc3",
        "aé▪🎉é".encode() + b"\xffa",
        b"ab\xe2\x96a",
        b"abcd\xf0\x9f\x8e",
        "é▪🎉".encode(),
    ):
        path = tmp_path / "text.txt"
        path.write_bytes(content)
        try:
            content.decode()
        except UnicodeDecodeError as error:
            with pytest.raises(UserError, match=rf"is not UTF-8 \(byte {error.start}\); convert it first"):
                check_text(path)
        else:
            assert check_text(path).size == len(content)


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "empty.txt").touch()
    for name, message in (("empty.txt", "is empty"), ("nothing.txt", "No such file"), (".", "Is a directory")):
        with pytest.raises(UserError, match=message):
            check_text(tmp_path / name)


def send(path, content):
    """Another process that writes into a pipe."""
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=[content])
    writer.start()
    return writer


def test_a_pipe_is_read_once_and_as_it_is(session, config, params, tmp_path):
    content = TEXT.encode() + b"caf\xe9\ra\r\n"
    writer = send(tmp_path / "pipe", content)
    assert check_text(tmp_path / "pipe").size is None
    read(session, tmp_path / "pipe")
    writer.join()
    other = online.Session(config, params)
    other.observe(content)
    assert session.digest() == other.digest()


def test_a_pipe_is_not_waited_for(session, tmp_path):
    """What is there is read, while its writer thinks about the rest."""
    os.mkfifo(tmp_path / "pipe")
    read = threading.Event()

    def write():
        with (tmp_path / "pipe").open("wb", buffering=0) as pipe:
            pipe.write("é".encode()[:1])
            read.wait(timeout=5)
            pipe.write("é".encode()[1:])

    writer = threading.Thread(target=write)
    writer.start()
    pieces, _ = file_pieces(session, check_text(tmp_path / "pipe"))
    first = next(pieces)
    read.set()
    assert [piece.tolist() for piece in (first, *pieces)] == [[0xC3], [0xA9]]
    writer.join()


def test_an_empty_pipe(session, tmp_path):
    writer = send(tmp_path / "pipe", b"")
    with pytest.raises(UserError, match="is empty"):
        read(session, tmp_path / "pipe")
    writer.join()


def test_memory_does_not_grow_with_the_file(session, tmp_path, monkeypatch):
    """One line of 16 MB, and of nothing: it has holes in the place of content."""
    report = session.observe(np.zeros(TOKENS_A_CALL, np.uint8))
    sizes = []

    def observe(piece, update_allowed):
        sizes.append(piece.size)
        state, place = session.snapshot()
        session.resume(Snapshot(state, place._replace(read=place.read + piece.size)))
        return report._replace(tokens=piece.size, chunks=report.chunks._replace(before=report.chunks.before.copy()))

    monkeypatch.setattr(session, "observe", observe)
    monkeypatch.setattr("hope_jax.online.learn.CALLS_A_PART", 64)
    path, size = tmp_path / "holes.txt", 1 << 24
    path.touch()
    os.truncate(path, size)
    text = check_text(path)
    tracemalloc.start()
    tokens = sum(part.tokens for part in read_with_progress(session, text, Console(file=io.StringIO())))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tokens == sum(sizes) == size and max(sizes) == TOKENS_A_CALL
    assert peak < size / 8
    tracemalloc.start()
    assert check_text(path) == text
    assert tracemalloc.get_traced_memory()[1] < size / 4  # blocks of one megabyte, as bytes and as text
    tracemalloc.stop()


@pytest.fixture
def words(tmp_path):
    """A tokenizer of words; one that is cut is unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = {"[UNK]": 0, "one": 1, "elephant": 2}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    return load_vocabulary(str(tmp_path / "words.json"))


def test_a_tokenizer_reads_the_whole_text_or_refuses_it(config, params, words, tmp_path, monkeypatch):
    session = online.Session(config, params, vocabulary=words)
    path, text = tmp_path / "text.txt", "one elephant\r\n" * 1000
    path.write_bytes(text.encode())
    pieces, total = file_pieces(session, check_text(path))
    pieces = list(pieces)
    assert len(pieces) == 2 and total == 2000
    assert np.concatenate(pieces).tolist() == [1, 2] * 1000
    monkeypatch.setattr("hope_jax.online.text_file.MOST_TOKENISED", len(text) - 1)
    with pytest.raises(UserError, match=r"more than 13,999 characters.*tokenizer.*; split it \(split -C 16M\)"):
        read(session, path)
    assert session.tokens == 0
    writer = send(tmp_path / "pipe", b"one \xff")
    with pytest.raises(UserError, match="is not UTF-8; this model reads text through a tokenizer"):
        read(session, tmp_path / "pipe")
    writer.join()


@pytest.fixture
def run(run, monkeypatch):
    """A run directory, and texts are saved after every call."""
    monkeypatch.setattr("hope_jax.online.learn.CALLS_A_PART", 1)
    return run


def test_a_long_text_is_saved_after_each_part(run, session, file, tmp_path, capsys, monkeypatch):
    """What a process that was killed has read is a beginning of the text."""
    saved = tmp_path / "alice.hope"
    learn_file(run, saved, file, [])
    shown = capsys.readouterr().out
    lengths = [*range(TOKENS_A_CALL, SIZE, TOKENS_A_CALL), SIZE]
    assert [f"saved {saved}: {tokens:,} tokens" in shown for tokens in lengths] == [True] * len(lengths)
    assert shown.count(f"saved {saved}") == len(lengths) > 2
    session.observe(TEXT)
    assert online.open(saved, session.model, session.params).digest() == session.digest()

    def killed(session, piece, **options):
        if session.tokens:
            raise SystemExit
        return observe(session, piece, **options)

    observe = online.Session.observe
    monkeypatch.setattr(online.Session, "observe", killed)
    with pytest.raises(SystemExit):
        learn_file(run, tmp_path / "bob.hope", file, [])
    assert online.open(tmp_path / "bob.hope", session.model, session.params).tokens == lengths[0]


def test_an_interrupt_saves_what_was_read(run, session, file, tmp_path, capsys, monkeypatch, interrupted):
    monkeypatch.setattr(online.Session, "observe", interrupted(online.Session.observe))
    learn_file(run, tmp_path / "alice.hope", file, [])
    assert f"stopped; {TOKENS_A_CALL:,} tokens are read" in capsys.readouterr().out
    assert online.open(tmp_path / "alice.hope", session.model, session.params).tokens == TOKENS_A_CALL


def test_a_fault_saves_what_was_read(run, session, file, tmp_path, capsys, monkeypatch):
    """The file is lost at its third piece, in the middle of a part."""

    def failing(*arguments):
        pieces, total = file_pieces(*arguments)

        def found():
            yield next(pieces)
            yield next(pieces)
            raise UserError("cannot read it: Input/output error")

        return found(), total

    monkeypatch.setattr("hope_jax.online.learn.file_pieces", failing)
    monkeypatch.setattr("hope_jax.online.learn.CALLS_A_PART", 4096)
    with pytest.raises(UserError, match="Input/output error"):
        learn_file(run, tmp_path / "alice.hope", file, [])
    assert f"{2 * TOKENS_A_CALL:,} tokens read" in capsys.readouterr().out
    session.observe(TEXT.encode()[: 2 * TOKENS_A_CALL])
    saved = online.open(tmp_path / "alice.hope", session.model, session.params)
    assert saved.digest() == session.digest()


@pytest.mark.parametrize("where", ["learn.joined", "session.Session.save", "session_file.write_bytes"])
def test_an_interrupt_while_it_reports_or_saves_loses_nothing(
    run, session, file, tmp_path, monkeypatch, interrupted, where
):
    """That of the second part; the program ends as interrupted."""
    module, _, name = f"hope_jax.online.{where}".rpartition(".")
    function = getattr(pkgutil.resolve_name(module), name)
    monkeypatch.setattr(f"{module}.{name}", interrupted(function))
    with pytest.raises(KeyboardInterrupt):
        learn_file(run, tmp_path / "alice.hope", file, [])
    assert online.open(tmp_path / "alice.hope", session.model, session.params).tokens == 2 * TOKENS_A_CALL
    assert not (tmp_path / "alice.hope.1").exists()


def test_an_interrupt_in_a_call_counts_what_the_call_read(session, file, monkeypatch, interrupted):
    """Its tokens are in the stream, and the next part begins after them."""
    stream, out = session.stream, io.StringIO()
    monkeypatch.setattr(session, "stream", stream._replace(advance=interrupted(stream.advance)))
    [report] = read(session, file, Console(file=out))
    assert report.tokens == session.tokens == TOKENS_A_CALL
    assert f"stopped; {TOKENS_A_CALL:,} tokens are read" in out.getvalue()


def test_a_part_ends_by_the_clock(session, file, monkeypatch):
    clock = iter(range(0, 1000, 25))  # seconds of a look
    monkeypatch.setattr("hope_jax.online.learn.time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    parts = [report.tokens for report in read(session, file)]
    assert parts[:1] == [3 * TOKENS_A_CALL] and sum(parts) == SIZE and len(parts) == 2


def test_the_bar_goes_on_from_part_to_part(session, tmp_path, monkeypatch):
    monkeypatch.setattr("hope_jax.online.learn.CALLS_A_PART", 1)
    path, out = tmp_path / "text.txt", io.StringIO()
    path.write_text("a" * 4 * TOKENS_A_CALL)
    assert len(read(session, path, Console(file=out, force_terminal=True, width=60))) == 4
    shares = [int(share) for share in re.findall(r"(\d+)%", out.getvalue())]
    assert shares == sorted(shares) and {0, 25, 50, 75, 100} <= set(shares)
