"""Files of sessions: exact, small, and refused when they are damaged, hostile or another model's."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from safetensors.numpy import load, save

from hope_jax import online
from hope_jax.online import session_file
from hope_jax.online.session_file import read_metadata
from hope_jax.training.errors import UserError


@pytest.fixture(scope="module")
def session(config, params, text):
    session = online.Session(config, params)
    session.observe(text[:200])
    return session


@pytest.fixture
def path(session, tmp_path):
    path = tmp_path / "alice.hope"
    session.fork().save(path)
    return path


def reopen(path, session, **options):
    return online.open(path, session.model, session.params, **options)


def test_a_session_goes_on_from_its_file_to_the_bit(session, path, text):
    again = reopen(path, session)
    assert again.digest() == session.digest() and again.tokens == 200
    unbroken = session.fork()
    assert again.observe(text[200:]).before == unbroken.observe(text[200:]).before
    assert again.digest() == unbroken.digest()
    assert again.generate("x", max_tokens=5) == unbroken.generate("x", max_tokens=5)


def test_a_gate_goes_on_too(config, params, text, tmp_path):
    gate = online.budget(0.25)
    session = online.Session(config, params, gate=gate, max_moved=0.5)
    session.observe(text[:200])
    session.save(tmp_path / "a")
    again = online.open(tmp_path / "a", config, params)
    assert again.gate is gate and again.max_moved == 0.5
    session.observe(text[200:])
    again.observe(text[200:])
    assert again.digest() == session.digest()


def test_the_file_of_a_fresh_session_holds_no_model(config, params, tmp_path, path):
    online.Session(config, params).save(tmp_path / "fresh")
    assert set(load((tmp_path / "fresh").read_bytes())) == {"held/tokens", "held/teaches", "seen"}
    moved = {name.split("/")[-1] for name in load(path.read_bytes()) if "/start/" in name}
    assert moved == {"w1", "w2"}
    assert online.open(tmp_path / "fresh", config, params).digest() == online.Session(config, params).digest()


def test_another_model_is_refused(path, session, params, config):
    other = jax.tree.map(lambda leaf: leaf, params)
    other["final_norm"] = jax.tree.map(lambda leaf: leaf + 1e-7, params["final_norm"])
    with pytest.raises(UserError, match="a session of a model with other parameters"):
        online.open(path, config, other)
    with pytest.raises(UserError, match="a session of a model with another config"):
        online.open(path, dataclasses.replace(config, cms_eta=0.25), params)
    with pytest.raises(UserError, match="does not say which run"):
        online.open(path)
    with pytest.raises(UserError, match="no such session"):
        reopen(path.with_name("bob.hope"), session)
    with pytest.raises(UserError, match="cannot read"):
        reopen(path.parent, session)


def test_no_flipped_bit_or_cut_is_believed(path, session):
    """A bit of every kilobyte and of the header, and cuts at every place of the header and some of the rest."""
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    places = [*range(0, header, 7), *rng.integers(header, len(whole), 60).tolist(), len(whole) - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(UserError):
            reopen(path, session)
    for length in [0, 1, 7, 8, 9, header - 1, header, *rng.integers(header, len(whole), 20).tolist()]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a session that can be opened"):
            reopen(path, session)
    path.write_bytes(whole + b"\0")
    with pytest.raises(UserError):
        reopen(path, session)
    path.write_bytes(whole)
    assert reopen(path, session).digest() == session.digest()


def forge(path, change):
    """The file with another header: `change` edits its parsed form in place."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])


def _set(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(header):
        for key in keys:
            header = header[key]
        header[last] = value

    return change


HOSTILE = {
    "a shape of 2**60 numbers": _set("seen", "shape", [2**60]),
    "many held tokens": _set("held/tokens", "shape", [2**40]),
    "a negative length": _set("held/tokens", "shape", [-1]),
    "another type": _set("seen", "dtype", "F64"),
    "no shape": lambda header: header["seen"].pop("shape") and None,
    "a tensor of no model": _set("../../etc/passwd", {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}),
    "offsets outside": _set("seen", "data_offsets", [0, 2**50]),
    "offsets that overlap": lambda header: _set("seen", "data_offsets", header["held/teaches"]["data_offsets"])(header),
    "a name twice": lambda header: b'{"__metadata__": {"format": "hope_jax session 1"}, "seen": 1, "seen": 2}',
    "deep nesting": lambda header: b"[" * 100_000 + b"]" * 100_000,
    "no JSON": lambda header: b"\x80\x04\x95pickle",
    "a list": lambda header: b"[1, 2]",
    "metadata of numbers": _set("__metadata__", "read", 8),
    "another format": _set("__metadata__", "format", "hope_jax session 2"),
    "chunks without end": _set("__metadata__", "levels", json.dumps({"cms_chunks": [2**62]})),
    "a gate that is none": _set("__metadata__", "gate", "__import__('os')"),
    "a count without end": _set("__metadata__", "read", "9" * 400),
    "no count": lambda header: header["__metadata__"].pop("context") and None,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(path, session, name):
    forge(path, HOSTILE[name])
    with pytest.raises(UserError, match="session"):
        reopen(path, session)


def test_a_file_that_claims_a_huge_header_or_is_huge_is_not_read(path, session, monkeypatch):
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="cut off"):
        reopen(path, session)
    forged = path.with_name("forged")
    session.fork().save(forged)
    os.truncate(forged, 1 << 40)  # a terabyte that takes no room
    with pytest.raises(UserError, match="a session of this model has at most"):
        reopen(forged, session)


def test_numbers_that_are_not_finite_are_refused(path, session):
    content = session_file.SessionFile(read_metadata(path), load(path.read_bytes()))
    del content.metadata["digest"]
    name = next(name for name in content.tensors if name.endswith("start/w1"))
    content.tensors[name] = np.full_like(content.tensors[name], np.nan)
    metadata = {**content.metadata, "digest": session_file.digest_of(content)}
    path.write_bytes(save(content.tensors, metadata=metadata))
    with pytest.raises(UserError, match="not finite"):
        reopen(path, session)


def test_contradicting_counts_are_refused(path, session):
    """A forged file whose sum is right."""
    for field, value in (("read", "7"), ("context", "960000"), ("context", "96")):
        content = session_file.SessionFile(read_metadata(path), load(path.read_bytes()))
        del content.metadata["digest"]
        content.metadata[field] = value
        forged = path.with_name("forged")
        metadata = {**content.metadata, "digest": session_file.digest_of(content)}
        forged.write_bytes(save(content.tensors, metadata=metadata))
        with pytest.raises(UserError, match="not a session that can be opened"):
            reopen(forged, session)


def test_random_bytes_are_refused(path, session):
    rng = np.random.default_rng(0)
    for size in (0, 5, 100, 10_000):
        path.write_bytes(rng.bytes(size))
        with pytest.raises(UserError):
            reopen(path, session)


def test_nothing_that_another_saved_is_overwritten(session, path, text):
    mine, theirs = reopen(path, session), reopen(path, session)
    theirs.observe(text[:50])
    theirs.save(path)
    theirs.save(path)  # its own file again
    mine.observe(text[50:100])
    with pytest.raises(UserError, match="another process may have saved it"):
        mine.save(path)
    assert reopen(path, session).digest() == theirs.digest()
    with pytest.raises(UserError, match="does not come from"):
        session.fork().save(path.with_name("alice.hope"))
    mine.save(path.with_name("mine.hope"))
    mine.save(path, overwrite=True)
    assert reopen(path, session).digest() == mine.digest()


def test_a_full_disk_leaves_the_old_file(session, path, monkeypatch):
    old = path.read_bytes()
    again = reopen(path, session)
    again.observe(b"more")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full; what was there before is untouched"):
        again.save(path)
    assert path.read_bytes() == old and [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(UserError, match="cannot save the session"):
        again.save(path.parent / "no folder" / "x")


SAVER = """
    import sys, time
    from pathlib import Path
    import numpy as np
    from hope_jax.online.session_file import SessionFile, write_session

    path, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    print("ready", flush=True)
    for i in range(count):
        tensors = {"x": np.full(500_000, i, np.float32)}
        content = SessionFile({"format": "hope_jax session 1", "who": name, "i": str(i)}, tensors)
        write_session(path, content, known=None, overwrite=True)
"""


def saver(path, name, count):
    command = [sys.executable, "-c", textwrap.dedent(SAVER), str(path), name, str(count)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as out:
        assert out.readline() == "ready\n"
    return process


ANY = {"x": session_file.Expected((500_000,), np.dtype(np.float32))}


def is_whole(path):
    return len(session_file.read_session(path, ANY).tensors["x"]) == 500_000


def test_kill_during_a_save_leaves_a_whole_file(tmp_path):
    path = tmp_path / "alice.hope"
    rng = np.random.default_rng(0)
    for delay in rng.uniform(0.01, 0.15, 4):
        process = saver(path, "one", 10_000)
        while not path.exists():
            pass
        try:
            process.wait(timeout=float(delay))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.wait()
        assert is_whole(path)
    write = session_file.write_session
    write(path, session_file.SessionFile({"format": session_file.FORMAT}, {}), known=None, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["alice.hope"]  # what a killed process left is gone


def test_two_processes_that_save_one_file(tmp_path):
    path = tmp_path / "alice.hope"
    processes = [saver(path, name, 30) for name in ("one", "two")]
    reads = 0
    while any(process.poll() is None for process in processes):
        if path.exists():
            reads += is_whole(path)
    for process in processes:
        assert process.returncode == 0
    assert reads
    assert read_metadata(path)["i"] == "29" and len(list(tmp_path.iterdir())) == 1
