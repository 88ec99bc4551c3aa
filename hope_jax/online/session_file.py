"""The file of a session: one safetensors file from which the stream goes on, to the bit (spec 11.6).

It holds what differs from a session that has read nothing, so the file of a fresh one is nearly empty and the model
itself is never in it. (Full values, not differences from the start weights: adding those again would round.) What
reads it trusts nothing: sizes, names, shapes and types are compared with those of the model before any number is
read, and a sha256 sum over everything finds a flipped bit.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from hope_jax.training.errors import UserError
from hope_jax.training.files import write_bytes

FORMAT = "hope_jax session 2"
MOST_HEADER = 1 << 20  # bytes; that of a session has a few kilobytes
PRIVATE = 0o600  # the last tokens of somebody's text are in it
PATIENCE = 30.0  # seconds to wait for another process that saves into the same folder
DTYPES = {"BOOL": np.bool_, "U8": np.uint8, "I32": np.int32, "U32": np.uint32, "F32": np.float32, "F64": np.float64}


class SessionFile(NamedTuple):
    """The content of a file."""

    metadata: dict[str, str]
    tensors: dict[str, np.ndarray]


class Expected(NamedTuple):
    """What a tensor must be; None: any length of this axis up to `most`."""

    shape: tuple[int | None, ...]
    dtype: np.dtype
    most: int = 0


def write_session(path: Path, content: SessionFile, *, known: str | None, overwrite: bool = False) -> str:
    """Writes a session in one step; a process that dies, or a full disk, leaves the old file.

    Args:
      path: of the file; its folder exists.
      content: what to write.
      known: the digest of the file that this session was read from or last written to, None if there was none.
      overwrite: replace whatever is there.
    Returns:
      The digest of the new file.
    Raises:
      UserError: the file holds something that this session did not put there, or it cannot be written.
    """
    from safetensors.numpy import save

    digest = digest_of(content)
    data = save(content.tensors, metadata={**content.metadata, "digest": digest})
    try:
        with _locked(path.parent):
            mine = (known or digest, digest)  # the second, where an interrupt came after it was written
            if not overwrite and path.exists() and _digest_in(path) not in mine:
                raise UserError(
                    f"{path} holds a session that this one does not come from (another process may have saved it); "
                    "save under another name, or with overwrite=True"
                )
            write_bytes(path, data, path.with_name(f".{path.name}.tmp"), PRIVATE)
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise UserError(f"cannot save the session to {path}: {why}; what was there before is untouched") from error
    return digest


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says about itself, without reading any tensor.

    Raises:
      UserError: there is no such file, or it is not a session.
    """
    with _opened(path) as file:
        return _header(path, file)[0]


def read_session(path: Path, expected: Mapping[str, Expected]) -> SessionFile:
    """The content of a file, all of it checked; "digest" is among its metadata.

    Args:
      path: of the file.
      expected: every tensor that it may hold.
    Raises:
      UserError: there is no such file, or it is not a sound session with these tensors.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    with _opened(path) as file:  # one file, whatever takes its name meanwhile
        metadata, entries, size = _header(path, file)
        most = MOST_HEADER + sum(_most_bytes(one) for one in expected.values())
        if size > most:
            raise _refused(path, f"it has {size:,} bytes, a session of this model has at most {most:,}")
        for name, entry in entries.items():
            if problem := _mismatch(name, entry, expected):
                raise _refused(path, problem)
        file.seek(0)
        data = file.read(size)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError) as error:
        raise _refused(path, f"it cannot be read ({error})") from error
    content = SessionFile(metadata, tensors)
    if digest_of(content) != metadata.get("digest"):
        raise _refused(path, "other bytes are in it than were written; it is damaged")
    for name, tensor in tensors.items():
        if np.issubdtype(tensor.dtype, np.floating) and not np.isfinite(tensor).all():
            raise _refused(path, f"{name} holds numbers that are not finite")
    return content


def digest_of(content: SessionFile) -> str:
    """sha256 over metadata, itself aside, and tensors."""
    metadata = {name: text for name, text in content.metadata.items() if name != "digest"}
    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(content.tensors):
        tensor = np.ascontiguousarray(content.tensors[name])
        total.update(f"{name} {tensor.dtype.name} {tensor.shape} ".encode())
        total.update(tensor.tobytes())
    return total.hexdigest()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"no such session: {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _header(path: Path, file: BinaryIO) -> tuple[dict[str, str], dict[str, Any], int]:
    """Metadata, entries of the tensors, and size of a file."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(MOST_HEADER, size - 8):
        raise _refused(path, "it is not a safetensors file, or it was cut off")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
        metadata = header.pop("__metadata__")
        sound = all(isinstance(value, str) for value in metadata.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        metadata, sound, header = {}, False, {}
    if not sound or metadata.get("format") != FORMAT:
        raise _refused(path, f"it does not say that it is a {FORMAT!r}")
    return metadata, header, size


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _mismatch(name: str, entry: Any, expected: Mapping[str, Expected]) -> str | None:
    """Why an entry of the header is not a tensor of this model."""
    if name not in expected:
        return f"it holds {name!r:.80}, which this model has not"
    one = expected[name]
    try:
        shape, dtype = list(entry["shape"]), DTYPES[entry["dtype"]]
        fits = len(shape) == len(one.shape) and all(
            type(n) is int and (n == m if m is not None else 0 <= n <= one.most)
            for n, m in zip(shape, one.shape, strict=True)
        )
    except (KeyError, TypeError):
        return f"the entry of {name} is malformed"
    if not fits or np.dtype(dtype) != one.dtype:
        return f"{name} has shape {shape!s:.80} of {entry['dtype']}, this model's has {list(one.shape)} of {one.dtype}"
    return None


def _most_bytes(one: Expected) -> int:
    return math.prod(one.most if n is None else n for n in one.shape) * one.dtype.itemsize


def _refused(path: Path, problem: str) -> UserError:
    return UserError(f"{path} is not a session that can be opened: {problem}")


def _digest_in(path: Path) -> str | None:
    """The digest that a file claims; None if it is not a session."""
    try:
        return read_metadata(path).get("digest")
    except UserError:
        return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time saves into a folder; a process that dies leaves no lock behind."""
    handle = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + PATIENCE
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"another process has been saving into {folder} for {PATIENCE:g} s") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(handle)
