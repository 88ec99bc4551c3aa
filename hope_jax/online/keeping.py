"""A session as the content of a file, and back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.models import ModelConfig
from hope_jax.online.fingerprint import config_fingerprint
from hope_jax.online.gates import Gate, parse_gate
from hope_jax.online.place import Place, Snapshot
from hope_jax.online.session import Session
from hope_jax.online.session_file import FORMAT, Expected, SessionFile, read_metadata, read_session
from hope_jax.online.stream import Held
from hope_jax.training.errors import UserError
from hope_jax.training.overrides import apply_overrides, from_dict, one_line
from hope_jax.training.versions import versions
from hope_jax.types import path_string

# Fields of the config that a session may have chosen for itself, on a model trained with others.
LEVELS = ("cms_chunks", "cms_eta", "cms_variant", "cms_meta", "mlp_chunks")
LEARNING_CHUNKS, LEARNING_ETA = (32, 128), 1.0  # of a run whose CMS levels are ordinary parameters
MOST_CHUNK = 1 << 20
STATE, TOKENS, TEACHES, SEEN = "state/", "held/tokens", "held/teaches", "seen"
COUNTS = ("read", "context")
EVERY = 10**15  # tokens; more than any stream has


def from_run(run_dir: Path | str, overrides: tuple[str, ...] = (), **options: Any) -> Session:
    """A session of a trained run.

    CMS levels that were ordinary parameters in training become fast levels, as spec 6.7 assigns the parts of a
    pre-trained model to levels: two at most, written every 32 and 128 tokens.

    Args:
      run_dir: of the run.
      overrides: how its levels learn, as "cms_eta=0.5": fields of the model config that are in `LEVELS`.
      options: of `Session`.

    Raises:
      UserError: no such run, or an override that cannot be.
    """
    for override in overrides:
        if (name := override.partition("=")[0]) not in LEVELS:
            raise UserError(f"{override}: {name} is the run's own; a session chooses {', '.join(LEVELS)}")
    config = _config_of(Path(run_dir))
    if config.has_cms and not config.fast_chunks:
        chunks = LEARNING_CHUNKS[: len(config.cms_hidden)]
        config = dataclasses.replace(config, cms_chunks=chunks, cms_eta=LEARNING_ETA)
    return _of_run(Path(run_dir), apply_overrides(config, overrides), **options)


def _config_of(run_dir: Path) -> ModelConfig:
    """Of a run's model, without reading its parameters."""
    from hope_jax.training.config import read_config

    try:
        return dataclasses.replace(read_config(run_dir).model, remat="none")
    except OSError as error:
        raise UserError(f"cannot read the run {str(run_dir)!r:.80}: {error.strerror}; give another place") from error


def _of_run(run_dir: Path, config: ModelConfig, **options: Any) -> Session:
    from hope_jax.training.load import load_pretrained
    from hope_jax.training.run_dir import read_seen_bytes, run_vocabulary

    _, params = load_pretrained(run_dir)
    run = str(run_dir.resolve())  # a session's file is opened from other folders too
    known = {"vocabulary": run_vocabulary(run_dir), "seen": read_seen_bytes(run_dir), "run": run}
    return Session(config, params, **{**known, **options})


def open(
    path: Path | str,
    model: ModelConfig | None = None,
    params: Any = None,
    *,
    run: Path | str | None = None,
    gate: Gate | None = None,
    **options: Any,
) -> Session:
    """A session from its file; its stream goes on where it was saved, to the bit.

    Args:
      path: of the file.
      model, params: of the model; without them they come from the run.
      run: where the model is; None: where it was when the session began.
      gate: the session's, if it is none of `hope_jax.online.gates`.
      options: of `Session`, where they are not in the file.

    Raises:
      UserError: no such file, a file that is damaged, hostile or of another model, or no such run.
    """
    path = Path(path)
    metadata = read_metadata(path)
    try:
        chosen = _read_choices(metadata)
        gate = gate or parse_gate(metadata["gate"])
        max_moved = float(metadata["max_moved"]) if metadata["max_moved"] else None
        counts = {name: _read_count(metadata[name]) for name in COUNTS}
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a session that can be opened: its metadata is damaged ({error})") from error
    made = {"gate": gate, "max_moved": max_moved, **options}
    if model is not None:
        session = Session(model, params, **made)
    else:
        run_dir = Path(run or metadata.get("run") or _no_run(path))
        config = _with_levels(_config_of(run_dir), chosen, path)
        _check(path, metadata, "config", config_fingerprint(config))  # before a checkpoint is read that may be any
        session = _of_run(run_dir, config, **made)
    _check(path, metadata, "config", config_fingerprint(session.model))
    _check(path, metadata, "base", session.base)
    _check(path, metadata, "vocabulary", session.vocabulary.digest)
    content = read_session(path, _expected(session))
    if content.metadata != metadata:
        raise UserError(f"{path} was saved by another process while it was opened; open it again")
    try:
        session.resume(_snapshot(session, content.tensors, counts))
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is not a session that can be opened: {error}") from error
    session.file = path.resolve(), metadata["digest"]
    return session


def content_of(session: Session) -> SessionFile:
    """What a file of the session holds."""
    (state, place), fresh = session.snapshot(), _named(session.fresh_state())
    tensors = {TOKENS: place.held.tokens, TEACHES: place.held.teaches, SEEN: place.seen}
    for name, leaf in _named(state).items():
        value = np.asarray(leaf)
        if value.tobytes() != np.asarray(fresh[name]).tobytes():
            tensors[STATE + name] = value
    config = dataclasses.asdict(session.model)
    return SessionFile(
        {
            "format": FORMAT,
            "config": config_fingerprint(session.model),
            "base": session.base,
            "levels": json.dumps({name: config[name] for name in LEVELS}),
            "gate": session.gate.name,
            "max_moved": "" if session.max_moved is None else repr(session.max_moved),
            "vocabulary": session.vocabulary.digest,
            "run": session.run,
            "read": str(place.read),
            "context": str(place.context),
            "versions": json.dumps(versions()),
        },
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
    )


def _snapshot(session: Session, tensors: dict[str, np.ndarray], counts: dict[str, int]) -> Snapshot:
    """What a file holds, as the place where a session goes on."""
    paths, structure = jax.tree_util.tree_flatten_with_path(session.fresh_state())
    leaves = [jnp.asarray(tensors.get(STATE + path_string(path), leaf)) for path, leaf in paths]
    held = Held(tensors[TOKENS].astype(np.int32), tensors[TEACHES] != 0)
    return Snapshot(jax.tree.unflatten(structure, leaves), Place(held, tensors[SEEN] != 0, **counts))


def _expected(session: Session) -> dict[str, Expected]:
    state = _named(session.fresh_state())
    return {STATE + name: Expected(leaf.shape, np.dtype(leaf.dtype)) for name, leaf in state.items()} | {
        TOKENS: Expected((None,), np.dtype(np.int32), session.chunk_size),
        TEACHES: Expected((None,), np.dtype(np.bool_), session.chunk_size),
        SEEN: Expected((session.model.vocab_size,), np.dtype(np.bool_)),
    }


def _named(state: Any) -> dict[str, Any]:
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _read_choices(metadata: dict[str, str]) -> dict[str, Any]:
    chosen = json.loads(metadata["levels"])
    if not isinstance(chosen, dict) or set(chosen) != set(LEVELS):
        raise ValueError("levels")
    chunks = [*chosen["cms_chunks"], *(c for c in chosen["mlp_chunks"] if c is not None)]
    if not all(type(chunk) is int and 0 < chunk <= MOST_CHUNK for chunk in chunks):
        raise ValueError(f"chunks {chunks!s:.80}")
    return chosen


def _read_count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < EVERY):
        raise ValueError(f"count {text!r:.40}")
    return int(text)


def _with_levels(config: ModelConfig, chosen: dict[str, Any], path: Path) -> ModelConfig:
    try:
        return from_dict(config, {**dataclasses.asdict(config), **chosen})
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a session of this run: {one_line(error)}") from error


def _no_run(path: Path) -> str:
    raise UserError(f"{path} does not say which run its model comes from; give run=, or model and params")


WHAT = {
    "config": "a model with another config (or other clocks of its levels)",
    "base": "a model with other parameters",
    "vocabulary": "a model with another tokenizer",
}


def _check(path: Path, metadata: dict[str, str], name: str, mine: str) -> None:
    if metadata.get(name) != mine:
        raise UserError(f"{path} is a session of {WHAT[name]}; open it with the model it began with")
