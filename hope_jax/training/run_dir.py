"""The run directory: whose it is, what it holds, and the text it was trained on.

RUN/config.yaml  corpus.json  [tokenizer.json]  metrics.jsonl  events.*  goodput.json  loss.png  profile/  stalls.txt
    [origin.json]  ckpt/<step>/{state, meta, checksums.json}
"""

import contextlib
import dataclasses
import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hope_jax.training.checkpoint import CHECKPOINTS, saved_step
from hope_jax.training.config import (
    CONFIG_FILE,
    TrainConfig,
    continue_config,
    differences,
    read_config,
    write_config,
)
from hope_jax.training.errors import RunFailed, UserError
from hope_jax.training.files import write_text
from hope_jax.training.goodput import GOODPUT_FILE
from hope_jax.training.metrics import METRICS_FILE
from hope_jax.training.mixture import Mixture
from hope_jax.training.profile import PROFILE
from hope_jax.training.vocabulary import BYTES, TOKENIZER_FILE, Vocabulary, load_vocabulary
from hope_jax.training.watchdog import STALLS_FILE

CORPUS_FILE = "corpus.json"
ORIGIN_FILE = "origin.json"  # of a run that begins from another
LOSS_PLOT = "loss.png"
WANDB = "wandb"  # what Weights & Biases keeps of its own
VERSUS = "versus"  # the run of the other model lies below the run it is compared with


def holds_run(run_dir: Path) -> bool:
    """Whether a run was begun in a directory."""
    return (run_dir / CONFIG_FILE).exists()


def resolve(config: TrainConfig, run_dir: Path, *, resume: bool = False, overwrite: bool = False) -> TrainConfig:
    """Checks that a run directory may be used for a config; writes nothing.

    Args:
      config: the wanted config.
      run_dir: where; a fresh run needs a directory without a run in it.
      resume: continue the run that is there.
      overwrite: the run that is there may be replaced.
    Returns:
      The config to use: with the length of the schedule made explicit, so that a continuation keeps it.
    Raises:
      UserError: there is a run and neither is asked for, there is none to resume, or it has another config.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir} is a file, not a directory; give another place with --run DIR")
    taken = holds_run(run_dir)
    if resume and not taken:
        raise UserError(f"nothing to resume: {run_dir} holds no run; leave out --resume to start one")
    if resume:
        config = continue_config(config, run_dir)
    elif taken and not overwrite:
        raise UserError(_taken(config, run_dir))
    elif not overwrite and saved_step(run_dir) is not None:
        raise UserError(
            f"{run_dir} holds checkpoints but no {CONFIG_FILE}; restore that file and --resume, "
            "give another place with --run DIR, or --overwrite to replace them"
        )
    return dataclasses.replace(config, decay_steps=config.schedule_steps)


def claim(config: TrainConfig, corpus: Mixture, run_dir: Path, *, overwrite: bool = False) -> None:
    """Makes the directory and writes config.yaml and corpus.json, after removing the run that is replaced.

    Raises:
      UserError: the run that is continued was trained on other text, or the directory cannot be written.
    """
    # Read before it is removed.
    tokenizer = None if config.tokenizer == BYTES else Path(tokenizer_of(config, run_dir)).read_text()
    if overwrite:
        remove_run(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _write_corpus_facts(corpus, run_dir)
        if tokenizer is not None:
            write_text(run_dir / TOKENIZER_FILE, tokenizer)
        write_config(config, run_dir)
    except OSError as error:
        raise UserError(f"cannot write {run_dir}: {error.strerror}; give another place with --run DIR") from error


@contextlib.contextmanager
def full_disk_named(run_dir: Path) -> Iterator[None]:
    """Says of a full disk what it is: the records of a run are small, but they are the first that do not fit.

    Raises:
      RunFailed: in the place of an OSError that says so.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        step = saved_step(run_dir)
        saved = "no checkpoint was saved before it" if step is None else f"the checkpoint of step {step} is whole"
        raise RunFailed(
            f"the disk of {run_dir} is full; {saved}; free some space and continue with --resume"
        ) from error


def _taken(config: TrainConfig, run_dir: Path) -> str:
    previous = read_config(run_dir)
    wanted = config if config.decay_steps else dataclasses.replace(config, decay_steps=previous.decay_steps)
    different = differences(wanted, previous)
    if different:
        return (
            f"{run_dir} belongs to another config ({'; '.join(different)}); "
            "give another place with --run DIR, or --overwrite to replace that run"
        )
    return f"{run_dir} already holds this run; continue it with --resume, or replace it with --overwrite"


def remove_run(run_dir: Path) -> None:
    """Removes what a run wrote, and nothing else that lies in the directory."""
    records = (METRICS_FILE, GOODPUT_FILE, LOSS_PLOT, STALLS_FILE)
    for name in (CONFIG_FILE, CORPUS_FILE, TOKENIZER_FILE, ORIGIN_FILE, *records):
        (run_dir / name).unlink(missing_ok=True)
    for events in run_dir.glob("events.out.tfevents.*"):
        events.unlink()
    for directory in (CHECKPOINTS, PROFILE, WANDB):
        shutil.rmtree(run_dir / directory, ignore_errors=True)
    for other in (run_dir / VERSUS).glob("*"):
        remove_run(other)


def _write_corpus_facts(corpus: Mixture, run_dir: Path) -> None:
    """Writes corpus.json: sizes, fingerprint and the byte values (or tokens) seen in training.

    Raises:
      UserError: the run was trained on other text.
    """
    path = run_dir / CORPUS_FILE
    facts = {
        "name": corpus.name,
        "train_bytes": corpus.train_tokens,  # of a tokenised corpus: tokens
        "validation_bytes": corpus.validation.size,
        "sha256": corpus.sha256,
        "seen_bytes": corpus.seen_bytes,
    }
    if path.exists() and read_corpus_facts(run_dir)["sha256"] != facts["sha256"]:
        raise UserError(
            f"the text of {run_dir} has changed since it was trained on ({corpus.name}); "
            "give it the same text (the embedded corpus needs the same Python version), or start another run"
        )
    write_text(path, json.dumps(facts) + "\n")


def read_seen_bytes(run_dir: Path) -> list[int]:
    """The byte values (or tokens) that occurred in the training text of a run."""
    read_config(run_dir)  # says so when there is no run at all
    return read_corpus_facts(run_dir)["seen_bytes"]


def run_vocabulary(run_dir: Path) -> Vocabulary:
    """What the tokens of a run are, by the run's own copy of the tokenizer."""
    return load_vocabulary(BYTES if read_config(run_dir).tokenizer == BYTES else str(run_dir / TOKENIZER_FILE))


def tokenizer_of(config: TrainConfig, run_dir: Path) -> str:
    """The tokenizer of a run that goes on: what its config names, or the run's own copy when that is gone."""
    own = run_dir / TOKENIZER_FILE
    gone = config.tokenizer != BYTES and not Path(config.tokenizer).is_file()
    return str(own) if gone and own.is_file() else config.tokenizer


def read_corpus_facts(run_dir: Path) -> dict[str, Any]:
    """What corpus.json says.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = run_dir / CORPUS_FILE
    if not path.exists():
        raise UserError(f"{run_dir} holds no {CORPUS_FILE}; it is not a complete run, train it again")
    try:
        facts = json.loads(path.read_text())
        seen = facts["seen_bytes"]
        whole = isinstance(facts["sha256"], str) and bool(seen) and all(type(v) is int and v >= 0 for v in seen)
    except (ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged; restore it or train the run again")
    return facts
