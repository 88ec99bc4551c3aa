"""Sessions from process to process, and a process that is sent far too much: real commands, which share only files."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.processes import run

HOPE = ("-m", "hope_jax")
FACT = "The password of the archive is swordfish."
QUESTION, ANSWER = FACT[:30], FACT[30:]
GIGABYTE = 1_000_000_000


def lines_like_it() -> str:
    """A thousand facts by chance: what is copper in one line is something else in the next."""
    draw = random.Random(0).choice
    names, places = ("colour", "owner", "password"), ("archive", "garden", "river")
    words = ("copper", "copper", "copper", "willow", "willow", "lantern", "swordfish")
    return "".join(f"The {draw(names)} of the {draw(places)} is {draw(words)}.\n" for _ in range(1000))


@pytest.fixture(scope="module")
def hope(program_cache, tmp_path_factory):
    """A function that runs one command to its end; what it printed."""
    log = tmp_path_factory.mktemp("log")
    return lambda *words: run([str(word) for word in words], 1, cache=program_cache, log=log, program=HOPE)[0]


@pytest.fixture(scope="module")
def trained(hope, tmp_path_factory) -> Path:
    """A run that knows the words and how the lines are made."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "lines.txt").write_text(lines_like_it())
    small = ["model=hope_attention", "model.dim=32", "model.cms_hidden=64,64", "model.max_length=64", "seq_len=64"]
    once = ["eval_every=1000", "checkpoint_every=1000", "eval_batches=1", "final_eval_batches=1", "sample_bytes=1"]
    steps = ["steps=200", "batch_size=8", "learning_rate=0.01", f"data={folder / 'lines.txt'}"]
    hope("train", "smoke", *small, *once, *steps, "--run", folder / "run")
    return folder / "run"


@pytest.mark.slow
def test_a_fact_learned_in_one_process_is_answered_in_another(hope, trained, tmp_path):
    session, data = tmp_path / "alice.hope", tmp_path / "facts.txt"
    data.write_text(f"{FACT}\n" * 40)
    hope("learn", trained, "--session", session, "--data", data, "cms_eta=0.3")
    ask = ["generate", trained, "--prompt", QUESTION, "--temperature", "0", "--max-bytes", str(len(ANSWER))]
    assert hope(*ask, "--session", session).endswith(f"{FACT}\n")
    assert "swordfish" not in hope(*ask)  # the run itself has learned nothing


@pytest.mark.slow
def test_a_line_of_a_gigabyte_is_skipped_and_the_conversation_goes_on(trained, program_cache, tmp_path):
    session, path = tmp_path / "alice.hope", os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": str(program_cache)}
    with subprocess.Popen(
        [sys.executable, *HOPE, "chat", str(trained), "--session", str(session)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdin and process.stdout
        process.stdin.write(b"/tell before\n/tell ")
        for _ in range(GIGABYTE // 1_000_000):
            process.stdin.write(b"a" * 1_000_000)
        process.stdin.write(b"\n/tell after\n/levels\n")
        process.stdin.close()
        shown = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert "a line has at most 1,048,576 bytes, and nothing was learned from this one" in shown
    assert f"saved {session}: 13 tokens" in shown  # "before\nafter\n"
    assert usage.ru_maxrss * 1024 < GIGABYTE
