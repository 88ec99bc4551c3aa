"""The command line: what a user types, what comes back, and every mistake as one line with a remedy."""

import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from hope_jax.cli import main
from hope_jax.models import ModelConfig
from hope_jax.training.command import sample_lengths
from hope_jax.training.config import StartConfig, read_config
from hope_jax.training.errors import RunFailed
from hope_jax.training.interrupt import Stop
from hope_jax.training.invocation import command
from hope_jax.training.presets import PRESETS

SMALL = [
    *("model=transformer", "model.dim=16", "model.layers=1", "model.max_length=128", "batch_size=2", "seq_len=16"),
    *("steps=3", "warmup_steps=1", "eval_every=2", "final_eval_batches=2", "sample_bytes=8"),
]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"the square of {i} is {i * i}.\n" for i in range(300)))
    return path


@pytest.fixture(scope="module")
def small(text_file):
    return ["train", "smoke", *SMALL, f"data={text_file}"]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A run of three steps: its directory, and what the command printed."""
    path = tmp_path_factory.mktemp("runs") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        assert main([*small, "--run", str(path)]) == 0
    return path, out.getvalue(), err.getvalue()


@pytest.fixture
def run_dir(finished):
    return finished[0]


def hope(*words, **options):
    """The real command in a process of its own."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "hope_jax", *map(str, words)], capture_output=True, text=True, env=environment, **options
    )


def fails(capsys, *words):
    """The one line of stderr that a mistake leaves."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hope: ") and captured.err.count("\n") == 1 and captured.err.endswith("\n")
    return captured.err


def test_help_lists_presets_and_does_not_wait_for_orbax():
    code = (
        "import sys; from hope_jax.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print([name for name in ('orbax', 'datasets', 'grain', 'flax', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"^  {name} .*\w", done.stdout, re.M) for name in PRESETS)
    assert done.stdout.endswith("[]\n")


@pytest.mark.slow
def test_a_run_begins_from_another_and_is_continued(run_dir, tmp_path, capsys):
    words = ["train", "--from", str(run_dir), "start.momentum=reset", "--run", str(tmp_path / "new")]
    assert main([*words, "steps=1", "--auto-resume"]) == 0
    assert f"begins from {run_dir} at step 3, its momenta start again\n" in capsys.readouterr().out
    assert main([*words, "steps=2", "--auto-resume"]) == 0
    assert "begins from" not in capsys.readouterr().out
    config = read_config(tmp_path / "new")
    assert (config.steps, config.decay_steps, config.start) == (2, 1, StartConfig(str(run_dir), "reset"))
    words[2] = str(tmp_path / "other")
    assert f"start.run: {run_dir} there, {tmp_path}/other here" in fails(capsys, *words, "--resume")


def test_a_mistake_has_status_2_and_no_traceback():
    done = hope("train", "tniy")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"hope: unknown preset 'tniy'; did you mean 'tiny'? there are: {', '.join(PRESETS)}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required"),
        (["trian", "tiny"], "'train'"),
        (["train"], "give a preset, one of tiny, "),
        (["train", "--run", "/nowhere/run", "tniy"], "did you mean 'tiny'"),
        (["train", "tiny", "--add-level"], "give that with --from RUN"),
        (["train", "tiny", "--from", "/nowhere/run"], "leave out the preset tiny"),
        (["train", "data=x", "--from", "/nowhere/run"], "give it with --run DIR"),
        (["train", "--from", "/nowhere/run", "data=x", "--run", "/nowhere/new"], "/nowhere/run is not a run directory"),
        (["train", "tiny", "start.momentum=reset"], "give start.run=RUN"),
        (["train", "tiny", "start.run=/nowhere/run", "--versus", "transformer"], "leave --versus out"),
        (["train", "tiny", "stps=3"], "did you mean 'steps'"),
        (["train", "tiny", "--run", "x", "stps=3"], "did you mean 'steps'"),
        (["train", "tiny", "steps=many"], "steps=many: expected a whole number"),
        (["train", "tiny", "model=hopee"], "did you mean 'hope'"),
        (["train", "tiny", "model.cms_chunks=4,6"], "[4, 6]"),
        (["train", "tiny", "cms_periods=1,2,4"], "has 2 CMS levels"),
        (["train", "tiny", "model=transformer", "cms_periods=1"], "has no CMS levels"),
        (["train", "tiny", f"seed={2**63}"], "below 2**63"),
        (["train", "tiny", "learning_rate=inf"], "learning_rate=inf must be a finite number"),
        (["train", "tiny", "--resume", "--overwrite"], "not allowed with argument --resume"),
        (["generate", "/nowhere/run", "--seed", str(2**63)], "below 2**63"),
        (["generate", "/nowhere/run", "--temperature", "inf"], "--temperature inf must be a finite number"),
        (["train", "tiny", "data=/nowhere/text.txt"], "no such file: /nowhere/text.txt"),
        (["train", "tiny", "--resum"], "did you mean --resume?"),
        (["train", "tiny", "mesh.tensor=3"], "model.heads=4 does not divide over mesh.tensor=3"),
        (["train", "tiny", "--versus", "gpt"], "there are: hope, "),
        (["train", "tiny", "model=transformer", "--versus", "transformer"], "choose one with model=NAME"),
        (["train", "tiny_transformer", "--resume", "--run", "/nowhere/run"], "leave out --resume"),
        (["train", "tiny_transformer", "mesh.data=512", "batch_size=512"], "needs 512 devices"),
        (["train", "tiny", "--profile", "10"], "for example --profile 10:13"),
        (["train", "tiny", "--profile", "13:10"], "the last is not before the first"),
        (["train", "tiny_transformer", "--run", "/nowhere/run", "--profile", "398:401"], "takes steps 1 to 400"),
        (["watch", "/nowhere/run", "--once"], "/nowhere/run holds no run (yet)"),
        (["watch", "/nowhere/run", "--one"], "did you mean --once?"),
        (["plot", "/nowhere/run"], "not a run directory"),
        (["plot", "/nowhere/run", "--x", "epochs"], "invalid choice: 'epochs'"),
        (["eval", "/nowhere/run"], "--data"),
        (["eval", "/nowhere/run", "--data", __file__], "not a run directory"),
        (["eval", "/nowhere/run", "--dta", __file__], "--data"),
        (["generate", "/nowhere/run"], "not a run directory"),
        (["generate", "/nowhere/run", "--top-k", "x"], "--top-k"),
        (["generate", "/nowhere/run", "--session", "/nowhere/a.hope"], "no such session: /nowhere/a.hope"),
        (["learn", "/nowhere/run", "--session", "a.hope"], "--data"),
        (["learn", "/nowhere/run", "--session", "a.hope", "--data", "/nowhere/text.txt"], "cannot read /nowhere/text"),
        (["learn", "/nowhere/run", "--session", "/nowhere/a.hope", "--data", __file__], "no such folder: /nowhere"),
        (["learn", "/nowhere/run", "--session", "a.hope", "--data", __file__], "not a run directory"),
        (["chat", "/nowhere/run"], "not a run directory"),
        (["chat", "/nowhere/run", "--sesion", "a.hope"], "did you mean --session?"),
        (["serve", "/nowhere/run", "--max-bytes", "0"], "--max-bytes 0 must be at least 1"),
        (["generate", "/nowhere/run", "steps=3"], "unknown argument 'steps=3'"),
    ],
)
def test_mistakes(capsys, words, message):
    assert message in fails(capsys, *words)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"\x89PNG\r\n\0\0", "looks binary"), (b"short", "give a longer text")],
)
def test_unusable_data(capsys, tmp_path, content, message):
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    line = fails(capsys, "train", "smoke", "model=transformer", f"data={path}", "--run", tmp_path / "run")
    assert message in line
    if content != b"short":
        assert str(path) in line


def test_train_ends_with_a_sample_and_the_path(finished):
    run_dir, out, err = finished
    assert err == ""
    assert out.splitlines()[-1].startswith(f"wrote {run_dir}: config.yaml")
    assert re.search(r"validation: \d\.\d{3} bits per byte after .*gzip \d\.\d{3}, xz \d\.\d{3}", out)
    assert "training bytes" in out and "sample" in out


def test_watch_and_plot(run_dir, tmp_path, capsys):
    capsys.readouterr()
    assert main(["watch", str(run_dir)]) == 0  # no terminal: one frame
    assert "last checkpoint" in capsys.readouterr().out
    assert main(["plot", str(run_dir), "--x", "time", "--out", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'a.png'}: 1 run over hours of machine time\n"


def test_a_continuation_is_not_traced_again(small, tmp_path, capsys, monkeypatch):
    told = []
    monkeypatch.setattr(
        "hope_jax.training.command.run_training", lambda *args, **options: told.append(options) or Stop.NO
    )
    for words in (["--profile", "2:3"], ["--profile=2:3"]):
        assert main([*small, "--run", str(tmp_path), *words]) == 0
        assert told[-1]["profile"] == (2, 3)
        assert "profile" not in told[-1]["again"] and "2:3" not in told[-1]["again"]


def test_resume_eval_and_generate(small, run_dir, text_file, capsys):
    capsys.readouterr()
    assert main([*small, "--run", str(run_dir), "--resume", "steps=5"]) == 0
    assert "step 5/5" in capsys.readouterr().out
    assert main(["eval", str(run_dir), "--data", str(text_file)]) == 0
    assert re.match(rf"{text_file}: \d\.\d{{3}} bits per byte over [\d,]+ bytes", capsys.readouterr().out)
    assert main(["generate", str(run_dir), "--prompt", "the square", "--max-bytes", "9"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("the square") and len(out.encode()) >= len("the square") + 9


def test_run_of_another_config(small, run_dir, capsys):
    line = fails(capsys, *small, "seed=7", "--run", run_dir)
    assert "seed: 0 there, 7 here" in line and "--run DIR" in line
    assert "--resume" in fails(capsys, *small, "--run", run_dir)


def test_prompt_with_unseen_bytes(run_dir, capsys):
    line = fails(capsys, "generate", run_dir, "--prompt", "naïve")
    assert "0xAF" in line and "0xC3" in line and "leave them out" in line


def test_versus_prints_the_table(small, tmp_path, capsys):
    words = [*small, "model=hope_attention", "model.cms_hidden=16,16", "--versus", "transformer"]
    assert main([*words, "--run", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    table = re.findall(r"│ (hope_attention|transformer) +│ +([\d,]+) │ +(\d\.\d{3}) │ +([\d,.-]+) │ +([\d.-]+) │", out)
    assert [row[0] for row in table] == ["hope_attention", "transformer"]
    ours, theirs = (int(row[1].replace(",", "")) for row in table)
    assert abs(ours - theirs) <= 0.01 * ours
    assert (tmp_path / "run" / "versus" / "transformer" / "config.yaml").exists()


def test_sample_fits_the_attention_cache(small, tmp_path, capsys):
    words = [*small, "steps=1", "model.max_length=16", "sample_bytes=300"]
    assert main([*words, "--run", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "sample" in out and out.splitlines()[-1].startswith("wrote")


@pytest.mark.parametrize(
    ("name", "max_length", "lengths"),
    [
        ("hope", 8, (48, 300)),
        ("transformer", 2048, (48, 300)),
        ("transformer", 32, (16, 16)),
        ("transformer", 1, (0, 1)),
    ],
)
def test_sample_lengths(name, max_length, lengths):
    assert sample_lengths(ModelConfig(name=name, max_length=max_length), 300) == lengths


@pytest.mark.parametrize(
    ("argv0", "expected"),
    [
        ("/some/where/hope_jax/__main__.py", "some/python -m hope_jax train 'a b'"),
        (".venv/bin/hope", ".venv/bin/hope train 'a b'"),
        ("/on/path/hope", "hope train 'a b'"),
        ("script.py", "hope train 'a b'"),
    ],
)
def test_commands_are_printed_as_they_were_typed(monkeypatch, argv0, expected):
    monkeypatch.setattr("sys.argv", [argv0])
    monkeypatch.setattr("sys.orig_argv", ["some/python"])
    monkeypatch.setattr("shutil.which", lambda name: f"/on/path/{name}")
    assert command("train", "a b") == expected


def test_failed_run_is_status_1(small, tmp_path, capsys, monkeypatch):
    """What makes a run fail is tested with the loop; here, how it is told."""

    def fail(*args, **options):
        raise RunFailed("step 3 gave loss nan")

    monkeypatch.setattr("hope_jax.training.command.train", fail)
    assert main([*small, "--run", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "hope: step 3 gave loss nan\n"


@pytest.mark.parametrize(("flags", "resume"), [(["--auto-resume"], None), (["--resume"], True), ([], False)])
@pytest.mark.parametrize(("stop", "status"), [(Stop.NO, 0), (Stop.INTERRUPTED, 130), (Stop.PREEMPTED, 42)])
def test_status_says_why_a_run_stopped(small, monkeypatch, flags, resume, stop, status):
    """What a launcher goes by; `again` is the command that continues, however the run was started."""

    def run_training(config, run_dir, **options):
        assert options["resume"] is resume and options["again"].endswith(" --resume")
        assert options["again"].count("resume") == 1
        return stop

    monkeypatch.setattr("hope_jax.training.command.run_training", run_training)
    assert main([*small, *flags]) == status


@pytest.mark.slow
def test_hope_from_the_embedded_corpus_to_a_sample(tmp_path, capsys):
    """The preset of every part, unchanged: a Hope model on the embedded corpus."""
    run_dir = str(tmp_path / "run")
    assert main(["train", "smoke", "--run", run_dir]) == 0
    assert re.search(r"^hope step 6/6 ", capsys.readouterr().out, re.M)
    assert main(["eval", run_dir, "--data", __file__]) == 0
    bpb = re.search(r": (\d\.\d{3}) bits per byte", capsys.readouterr().out)
    assert bpb and 5 < float(bpb[1]) < 8
    assert main(["generate", run_dir, "--prompt", "def ", "--max-bytes", "20"]) == 0
    assert capsys.readouterr().out.startswith("def ")


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_resume(small, tmp_path):
    """A real SIGINT to a real process; what it prints is then typed."""
    words = [*small, "steps=100000", "--run", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-m", "hope_jax", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    records = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (records.exists() and records.read_text().count("\n") > 20):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    found = re.fullmatch(
        r"\nhope: finishing this step.*\nhope: interrupted; step (\d+) is saved in .*; continue with: (.*)\n", err
    )
    assert found, err
    step = int(found[1])
    assert (tmp_path / "run" / "ckpt" / str(step)).is_dir()
    done = subprocess.run([*shlex.split(found[2]), f"steps={step + 2}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"step {step + 2}/{step + 2}" in done.stdout
