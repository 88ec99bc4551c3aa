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
import yaml
from safetensors.numpy import load, save

from hope_jax import online
from hope_jax.models import ModelConfig, build_lm
from hope_jax.online import session_file
from hope_jax.online.fingerprint import config_fingerprint
from hope_jax.online.session_file import read_metadata
from hope_jax.training.config import TrainConfig, to_dict
from hope_jax.training.errors import UserError
from hope_jax.training.vocabulary import load_vocabulary
from tests.online.conftest import OTHERS

MIDDLE = 213  # tokens of a stream


@pytest.fixture(scope="module")
def session(config, params, text):
    """In the middle of everything: a chunk, the chunk of the slow level, and a context."""
    session = online.Session(config, params)
    session.observe(text[:MIDDLE])
    return session


@pytest.fixture
def path(session, tmp_path):
    path = tmp_path / "alice.hope"
    session.fork().save(path)
    return path


def reopen(path, session, **options):
    return online.open(path, session.model, session.params, **options)


def check_that_it_goes_on(session, path, text):
    """From its file as if it had never been saved, to the bit."""
    session.save(path)
    again = reopen(path, session)
    assert again.digest() == session.digest() and again.tokens == session.tokens
    assert again.generate("x", max_tokens=5, learn=False) == session.generate("x", max_tokens=5, learn=False)
    assert again.observe(text).before == session.observe(text).before
    assert again.digest() == session.digest()


def test_a_session_goes_on_from_its_file_to_the_bit(session, path, text):
    state, place = session.snapshot()
    assert place.context == 16 and state.nest.phase[0] == 2 and len(place.held.tokens) == 5
    assert np.any(state.nest.levels[1].pending["w1"])  # the errors of two chunks wait for the slow level's step
    check_that_it_goes_on(session.fork(), path.with_name("b.hope"), text[MIDDLE:])


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_any_model_goes_on_from_its_file_to_the_bit(name, text, tmp_path):
    config = ModelConfig(**OTHERS[name])
    session = online.Session(config, build_lm(config).init(jax.random.key(0)))
    session.observe(text[:MIDDLE])
    check_that_it_goes_on(session, tmp_path / "alice.hope", text[MIDDLE:])


def test_a_gate_goes_on_too(config, params, text, tmp_path):
    session = online.Session(config, params, gate=online.budget(0.25), max_moved=0.5)
    session.observe(text[:MIDDLE])
    check_that_it_goes_on(session, tmp_path / "a", text[MIDDLE:])
    again = online.open(tmp_path / "a", config, params)
    assert again.gate is session.gate and again.max_moved == 0.5


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


def test_a_config_with_more_fields_reads_the_files_of_today(path, session):
    @dataclasses.dataclass(frozen=True)
    class Later(ModelConfig):
        cms_depth: int = 2

    fields = dataclasses.asdict(session.model)
    assert config_fingerprint(Later(**fields)) == read_metadata(path)["config"]
    assert config_fingerprint(Later(**fields, cms_depth=3)) != read_metadata(path)["config"]
    for name, other in (("cms_eta", 0.25), ("cms_chunks", (8, 16)), ("norm_eps", 1e-5)):
        changed = dataclasses.replace(session.model, **{name: other})
        assert config_fingerprint(changed) != read_metadata(path)["config"]


@pytest.fixture
def run(config, params, tmp_path, monkeypatch):
    """A run in runs/tiny of the current folder: its config, and parameters without a checkpoint."""
    monkeypatch.chdir(tmp_path)
    values = to_dict(TrainConfig(model=config, seq_len=64))
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "config.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr("hope_jax.training.load.load_pretrained", lambda run: (config, params))
    monkeypatch.setattr("hope_jax.training.run_dir.run_vocabulary", lambda run: load_vocabulary("bytes"))
    monkeypatch.setattr("hope_jax.training.run_dir.read_seen_bytes", lambda run: None)
    return "runs/tiny"


def test_a_file_finds_its_run_from_any_folder(run, text, tmp_path, monkeypatch):
    session = online.from_run(run)
    session.observe(text[:50])
    session.save("alice.hope")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert online.open("../alice.hope").digest() == session.digest()


def test_a_run_that_cannot_be_read_is_refused(path):
    forge(path, lambda metadata, tensors: metadata.update(run="x" * 5000))
    with pytest.raises(UserError, match=r"cannot read the run 'xxxx.*: File name too long"):
        online.open(path)


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
    """The file with other content and the sum that belongs to it: `change` edits metadata and tensors in place."""
    metadata, tensors = read_metadata(path), load(path.read_bytes())
    change(metadata, tensors)
    digest = session_file.digest_of(session_file.SessionFile(metadata, tensors))
    path.write_bytes(save(tensors, metadata={**metadata, "digest": digest}))


def _says(**metadata):
    return lambda old, tensors: old.update(metadata)


def _holds(name, change):
    def changed(metadata, tensors):
        tensors[name] = np.ascontiguousarray(change(tensors.get(name)))

    return changed


def _levels(**chosen):
    def changed(metadata, tensors):
        metadata["levels"] = json.dumps(json.loads(metadata["levels"]) | chosen)

    return changed


def _poisoned(metadata, tensors):
    name = next(name for name in tensors if name.endswith("start/w1"))
    tensors[name] = np.full_like(tensors[name], np.nan)


# Every one of them is sound but for one thing.
HOSTILE = {
    "another type": (_holds("seen", lambda seen: seen.astype(np.float64)), r"seen has shape \[256\] of F64"),
    "another shape": (_holds("seen", lambda seen: seen[:-1]), r"seen has shape \[255\] .* this model's has \[256\]"),
    "another axis": (_holds("seen", lambda seen: seen[None]), r"seen has shape \[1, 256\]"),
    "too many held tokens": (_holds("held/tokens", lambda _: np.zeros(9, np.int32)), r"held/tokens has shape \[9\]"),
    "a tensor of no model": (_holds("../../etc/passwd", lambda _: np.zeros(1, bool)), "which this model has not"),
    "not a number": (_poisoned, "start/w1 holds numbers that are not finite"),
    "a token of no model": (_holds("held/tokens", lambda old: old + 256), "held tokens are not all in 0 to 255"),
    "flags without tokens": (_holds("held/teaches", lambda old: old[:-1]), "5 tokens are held, with 4 flags"),
    "another format": (_says(format="hope_jax session 0"), "does not say that it is a 'hope_jax session"),
    "another config": (_says(config="0" * 16), "a session of a model with another config"),
    "another base": (_says(base="0" * 64), "a session of a model with other parameters"),
    "another tokenizer": (_says(vocabulary="0" * 64), "a session of a model with another tokenizer"),
    "chunks without end": (_levels(cms_chunks=[8, 2**62]), r"damaged \(chunks \[8, 4611686018427387904"),
    "chunks below one": (_levels(cms_chunks=[-8, 32]), r"damaged \(chunks \[-8, 32"),
    "chunks that are true": (_levels(mlp_chunks=[True]), r"damaged \(chunks \[8, 32, True"),
    "a choice more": (_levels(dim=1 << 40), r"damaged \(levels\)"),
    "choices that are a list": (_says(levels="[]"), r"damaged \(levels\)"),
    "choices without end": (_says(levels="[" * 100_000), "damaged .*recursion"),
    "a gate that is none": (_says(gate="__import__('os')"), r"damaged \(no gate \"__import__"),
    "a distance that is none": (_says(max_moved="far"), "damaged .*'far'"),
    "a distance below zero": (_says(max_moved="-1.0"), "max_moved is a distance"),
    "a count without end": (_says(read="8" + "0" * 400), r"damaged \(count '8000"),
    "a count past any stream": (_says(read=str(8 * 10**15)), r"damaged \(count '8000"),
    "a count below zero": (_says(context="-8"), r"damaged \(count '-8"),
    "digits of another script": (_says(read="\N{ARABIC-INDIC DIGIT EIGHT}"), r"damaged \(count '٨"),
    "no count": (lambda metadata, _: metadata.pop("context"), r"damaged \('context'\)"),
    "a count that is no chunk": (_says(read="209"), "209 tokens read, 16 in the context, in chunks of 8"),
    "more context than text": (_says(read="8"), "8 tokens read, 16 in the context"),
    "a full context": (_says(context="96"), "a context of 96 tokens leaves no room"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(path, session, name):
    change, message = HOSTILE[name]
    forge(path, change)
    with pytest.raises(UserError, match=message):
        reopen(path, session)


def forge_header(path, change):
    """The file with another header: `change` edits its parsed form in place, or returns bytes."""
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


def _twice(header):
    return json.dumps(header).encode()[:-1] + b', "seen": ' + json.dumps(header["seen"]).encode() + b"}"


NO_FORMAT = "does not say that it is a"
HEADERS = {
    "a shape of 2**60 numbers": (_set("seen", "shape", [2**60]), r"seen has shape \[1152921504606846976\]"),
    "many held tokens": (_set("held/tokens", "shape", [2**40]), r"held/tokens has shape \[1099511627776\]"),
    "a negative length": (_set("held/tokens", "shape", [-1]), r"held/tokens has shape \[-1\]"),
    "half a length": (_set("held/tokens", "shape", [5.0]), r"held/tokens has shape \[5.0\]"),
    "a type of no name": (_set("seen", "dtype", "BF16"), "the entry of seen is malformed"),
    "no shape": (lambda header: header["seen"].pop("shape") and None, "the entry of seen is malformed"),
    "no entry": (_set("seen", 1), "the entry of seen is malformed"),
    "offsets outside": (_set("seen", "data_offsets", [0, 2**50]), "it cannot be read"),
    "offsets that overlap": (
        lambda header: _set("seen", "data_offsets", header["held/teaches"]["data_offsets"])(header),
        "it cannot be read",
    ),
    "a name twice": (_twice, NO_FORMAT),
    "deep nesting": (lambda header: b"[" * 100_000 + b"]" * 100_000, NO_FORMAT),
    "no JSON": (lambda header: b"\x80\x04\x95pickle", NO_FORMAT),
    "a list": (lambda header: b"[1, 2]", NO_FORMAT),
    "metadata of numbers": (_set("__metadata__", "read", 8), NO_FORMAT),
    "no metadata": (lambda header: header.pop("__metadata__") and None, NO_FORMAT),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers_are_refused(path, session, name):
    change, message = HEADERS[name]
    forge_header(path, change)
    with pytest.raises(UserError, match=message):
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


def test_what_an_interrupted_save_wrote_is_its_own(session, tmp_path, monkeypatch):
    def interrupted(*arguments):
        write_bytes(*arguments)
        raise KeyboardInterrupt

    write_bytes = session_file.write_bytes
    with monkeypatch.context() as patched:
        patched.setattr(session_file, "write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.save(tmp_path / "bob.hope")
    session.save(tmp_path / "bob.hope")
    assert reopen(tmp_path / "bob.hope", session).digest() == session.digest()


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
    from hope_jax.online.session_file import FORMAT, SessionFile, write_session

    path, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    print("ready", flush=True)
    for i in range(count):
        tensors = {"x": np.full(500_000, i, np.float32)}
        content = SessionFile({"format": FORMAT, "who": name, "i": str(i)}, tensors)
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
