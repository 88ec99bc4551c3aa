"""`hope chat`, `hope learn` and `hope generate --session`: what is read, shown, saved and answered."""

import io
import re
import sys
import tracemalloc
from typing import Any

import pytest
from rich.console import Console

from hope_jax import online
from hope_jax.cli import main
from hope_jax.online.chat import MOST_LINE, Chat, _piped, _typed, chat
from hope_jax.online.learn import learn_file, start_or_continue
from hope_jax.training.errors import UserError

FACT = "The password of the archive is swordfish."


@pytest.fixture
def session(config, params):
    return online.Session(config, params)


def converse(session, *lines, file=None):
    """What a conversation of these lines prints."""
    out = io.StringIO()
    chat = Chat(session, file, Console(file=out, width=100, highlight=False), max_tokens=8, temperature=0)
    chat.run(lines)
    return out.getvalue()


def test_a_line_shows_what_it_taught(session, config, params):
    shown = converse(session, f"/tell {FACT}")
    report = online.Session(config, params).observe(f"{FACT}\n")
    assert f"{len(FACT) + 1} tokens read, {report.held} wait" in shown
    assert f"surprise {report.before:.3f} -> {report.after:.3f} nats/token" in shown
    for level in report.levels:
        fired = f"fired {level.updates}x"
        assert re.search(rf"{level.name} +every {level.chunk_size} .*{fired} .*moved {level.moved:.4f}", shown)


def test_the_stream_is_the_lines_and_the_answers(session, config, params):
    shown = converse(session, "one two", "/tell three")
    other = online.Session(config, params)
    other.observe("one two")
    answer = other.generate(until="\n", max_tokens=8, temperature=0)
    other.observe("\n", update_allowed=False)
    other.observe("three\n")
    assert session.digest() == other.digest()
    assert re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", answer) in shown


def test_it_saves_at_the_end_and_goes_on(session, config, params, tmp_path):
    file = tmp_path / "alice.hope"
    assert f"saved {file}" in converse(session, f"/tell {FACT}", "/quit", "/tell never read", file=file)
    again = online.open(file, config, params)
    assert again.digest() == session.digest()
    assert "saved" not in converse(again, "/levels", file=file)  # nothing changed
    assert f"saved {file}" in converse(again, "/tell more", file=file)


def test_ctrl_c_at_the_end_saves_all_the_same(session, config, params, tmp_path, monkeypatch, interrupted):
    """At its last save, the second."""
    monkeypatch.setattr(online.Session, "save", interrupted(online.Session.save))
    with pytest.raises(KeyboardInterrupt):
        converse(session, "/save", f"/tell {FACT}", file=tmp_path / "alice.hope")
    assert online.open(tmp_path / "alice.hope", config, params).digest() == session.digest()


def test_what_cannot_be_saved_is_saved_beside(session, config, params, tmp_path):
    """Another process has saved the file meanwhile."""
    file, beside = tmp_path / "alice.hope", tmp_path / "alice.hope.2"
    online.Session(config, params).save(file)
    (tmp_path / "alice.hope.1").touch()
    shown = converse(session, f"/tell {FACT}", file=file)
    assert "does not come from" in shown and f"saved {beside} instead" in shown
    assert online.open(beside, config, params).digest() == session.digest()


@pytest.mark.parametrize(("said", "added"), [("ok", 1), ("ok\n", 0)])
def test_a_line_ends_once(session, monkeypatch, said, added):
    def answer(**options):
        session.observe(said)
        yield said.rstrip("\n")

    monkeypatch.setattr(session, "answer", answer)
    converse(session, "a question")
    assert session.tokens == len("a question") + len(said) + added
    assert session.snapshot().place.held.tokens[-1] == ord("\n")


def test_what_a_pipe_sends_is_read_byte_by_byte(run, config, params, tmp_path, monkeypatch, capsys):
    """Lines that are not UTF-8, whatever the locale reads, and those before and after them."""
    sent = b"/tell good\r\n/tell caf\xe9 \xff\n/load \xff\n/score \xff\xfe\n/tell \xc3\xa9"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(sent), encoding="utf-8"))
    chat(run, tmp_path / "alice.hope", [])
    shown = capsys.readouterr().out
    assert "cannot read \N{REPLACEMENT CHARACTER}: No such file" in shown and "nats/token" in shown
    other = online.Session(config, params)
    other.observe(b"good\ncaf\xe9 \xff\n\xc3\xa9\n")
    assert online.open(tmp_path / "alice.hope", config, params).digest() == other.digest()


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_line_of_the_greatest_length_is_read_and_a_longer_one_is_not(session, config, params, monkeypatch, end):
    """Nothing is learned from it, and the lines before and after it are."""
    monkeypatch.setattr("hope_jax.online.chat.MOST_LINE", 16)
    read, longer = "/tell écaf\N{BLACK SQUARE}xy".encode(), b"/tell 12345678901"
    assert len(read) == 16 and len(longer) == 17
    sent = [read, longer, b"/tell b", b"/tell " + b"c" * 1000, read, longer * 5]
    shown = converse(session, *_piped(io.BytesIO(end.join(sent))))
    assert shown.count("a line has at most 16 bytes, and nothing was learned from this one") == 3
    assert "/load FILE or hope learn --data FILE" in shown
    other = online.Session(config, params)
    other.observe(b"\n".join([read[6:], b"b", read[6:], b""]))
    assert session.digest() == other.digest()


def test_the_last_line_may_be_of_the_greatest_length(session, monkeypatch):
    monkeypatch.setattr("hope_jax.online.chat.MOST_LINE", 16)
    assert "10 tokens read" not in converse(session, *_piped(io.BytesIO(b"/tell 1234567890x")))
    assert "11 tokens read" in converse(session, *_piped(io.BytesIO(b"/tell 1234567890")))


class Endless(io.RawIOBase):
    """A line of so many bytes, then another."""

    def __init__(self, size):
        self.left = size

    def readable(self):
        return True

    def readinto(self, buffer):
        if self.left > 0:
            buffer[:] = b"a" * len(buffer)
            self.left -= len(buffer)
            return len(buffer)
        rest, self.left = (b"\n/tell on\n", -1) if self.left == 0 else (b"", -1)
        buffer[: len(rest)] = rest
        return len(rest)


def test_a_line_is_in_memory_up_to_its_limit():
    tracemalloc.start()
    lines = [len(line) for line in _piped(io.BufferedReader(Endless(1 << 26)))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lines == [MOST_LINE + 2, len("/tell on")]
    assert peak < 6 * MOST_LINE  # joined from parts, then decoded; the line has 64


def test_a_bad_byte_at_the_terminal_is_a_byte(session, config, params, monkeypatch):
    keyboard = io.TextIOWrapper(io.BytesIO(b"/tell caf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", keyboard)
    converse(session, *_typed())
    other = online.Session(config, params)
    other.observe(b"caf\xe9\n")
    assert session.digest() == other.digest()


def test_what_learn_cannot_save_is_beside(run, config, params, tmp_path, monkeypatch):
    file, data = tmp_path / "alice.hope", tmp_path / "facts.txt"
    data.write_text(FACT)

    def read(session, *_):  # meanwhile another process saves the file
        session.observe(FACT)
        online.Session(config, params).save(file)
        yield session.report([], 0, 0)

    monkeypatch.setattr("hope_jax.online.learn.read_with_progress", read)
    with pytest.raises(UserError, match=r"what was learned is in .*alice\.hope\.1"):
        learn_file(run, file, data, [])
    assert online.open(f"{file}.1", config, params).tokens == len(FACT)


def test_a_gate_for_a_new_session_and_its_own_for_one_that_goes_on(run, tmp_path):
    file, data = tmp_path / "alice.hope", tmp_path / "facts.txt"
    data.write_text(FACT)
    asked: dict[str, Any] = {"gate": "budget:0.5", "max_moved": 0.25}
    learn_file(run, file, data, [], **asked)
    own = start_or_continue(run, file)
    assert (own.gate, own.max_moved) == (online.budget(0.5), 0.25)
    assert start_or_continue(run, file, **asked).digest() == own.digest()
    others: tuple[tuple[dict[str, Any], str], ...] = (
        ({"gate": "never"}, "with --gate budget:0.5:0.1, not never"),
        ({"max_moved": 2.0}, "with --max-moved 0.25, not 2.0"),
        ({"gate": "often"}, "--gate: no gate 'often'"),
    )
    for other, message in others:
        with pytest.raises(UserError, match=re.escape(message)):
            start_or_continue(run, file, **other)
    with pytest.raises(UserError, match="max_moved is a distance"):
        start_or_continue(run, None, max_moved=-1.0)


def test_it_says_that_nothing_was_saved(session, tmp_path):
    assert "nothing was saved; start with --session FILE" in converse(session, "/tell a")
    assert "saved" not in converse(session, f"/save {tmp_path / 'a.hope'}").partition("saved")[2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/laod x", "no command '/laod'; there are /tell, /load"),
        ("/load /nowhere/text.txt", "cannot read /nowhere/text.txt"),
        ("/load ~nobody.at.all/text.txt", "~nobody.at.all is nobody's home"),
        ("/load a\0b", "a name has no NUL bytes"),
        ("/save a\0b", "a name has no NUL bytes"),
        ("/forget level_7", "nothing is called 'level_7' in this session; it has fast, level_0"),
        ("/learn maybe", "write /learn on or /learn off"),
        ("/save", "write /save FILE"),
        ("/score", "nothing to score"),
    ],
)
def test_a_mistake_is_one_line_and_the_conversation_goes_on(session, line, message):
    before = session.digest()
    shown = converse(session, line, "/help")
    assert message in shown and "ends, as does Ctrl-D" in shown
    assert session.digest() == before


def test_load_forget_score_and_levels(session, tmp_path):
    file = tmp_path / "facts.txt"
    file.write_text(f"{FACT}\n" * 20)
    shown = converse(session, f"/load {file}", "/levels", f"/score {FACT}", "/forget all", "/levels")
    assert f"{20 * (len(FACT) + 1)} tokens read" in shown and "nats/token" in shown
    assert shown.count("moved 0.0000") == 2  # of the two levels, after they were forgotten
    for content, message in ((b"\xff", "is not UTF-8 (byte 0)"), (b"", "is empty")):
        file.write_bytes(content)
        assert message in converse(session, f"/load {file}")


def test_learn_off_reads_and_does_not_teach(session, config, params):
    converse(session, "/learn off", f"/tell {FACT}")
    assert session.tokens == len(FACT) + 1
    assert set(session.diff(online.Session(config, params)).values()) == {0.0}


def test_ctrl_c_stops_the_answer_and_not_the_program(session, monkeypatch):
    def answer(**options):
        yield "half an"
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "answer", answer)
    shown = converse(session, "a question", "/levels")
    assert "half an (stopped)" in shown and "moved" in shown.rpartition("(stopped)")[2]


def test_what_would_move_the_cursor_is_shown_as_a_mark(session, monkeypatch):
    monkeypatch.setattr(session, "answer", lambda **options: iter(["a\x1b[2Jb"]))
    assert "a\N{REPLACEMENT CHARACTER}[2Jb" in converse(session, "a question")


@pytest.mark.slow
def test_learned_in_one_command_and_answered_in_another(tmp_path, capsys, monkeypatch):
    """A run whose levels were ordinary parameters in training; every command opens the session's file anew."""
    run, session, data = tmp_path / "run", str(tmp_path / "alice.hope"), tmp_path / "facts.txt"
    data.write_text(f"{FACT}\n" * 60)
    small = ["model=hope_attention", "model.dim=32", "model.layers=1", "model.cms_hidden=64,64", "seq_len=32"]
    assert main(["train", "smoke", *small, "steps=2", "--run", str(run)]) == 0
    learn = ["learn", str(run), "--session", session, "--data", str(data)]
    capsys.readouterr()
    assert main([*learn, "cms_eta=0.5"]) == 0
    shown = capsys.readouterr().out
    assert f"saved {session}: {60 * (len(FACT) + 1):,} tokens" in shown and "level_1  every 128" in shown

    ask = ["generate", str(run), "--session", session, "--prompt", "The pass", "--temperature", "0", "--max-bytes", "9"]
    assert main(ask) == 0
    first = capsys.readouterr().out
    assert first.startswith("The pass") and first.count("\n") >= 1
    assert main(ask) == 0
    assert capsys.readouterr().out == first  # the file is as it was

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"/levels\n/tell more\n")))
    assert main(["chat", str(run), "--session", session]) == 0
    assert f"saved {session}" in capsys.readouterr().out
    assert main([*learn, "cms_eta=0.25"]) == 2
    assert "began without cms_eta=0.25" in capsys.readouterr().err
    (tmp_path / "bad.hope").write_bytes(b"no session")
    assert main(["generate", str(run), "--session", str(tmp_path / "bad.hope")]) == 2
    assert "is not a session" in capsys.readouterr().err
