"""A source as tokens on the disk: read and tokenised once, then memory-mapped by every run.

CACHE/NAME-<key>/  train.bin  train.npy  validation.bin  validation.npy  facts.json

The .bin files are flat arrays of tokens, the .npy files say where each document begins, facts.json holds sizes and
the fingerprint of the tokens. CACHE is `cache.cache_dir()`. The key covers
the files (names, sizes, times), the column and the vocabulary; a dataset of the hub goes by its name alone, so that a
second run needs no network. Two runs may ingest the same source at once: the folder appears by a rename. Of the
processes of one run that share a cache, the first ingests and the others wait.
"""

import hashlib
import json
import re
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hope_jax.training import distributed
from hope_jax.training.cache import cache_dir
from hope_jax.training.corpus import Corpus
from hope_jax.training.errors import UserError
from hope_jax.training.sources import HUB, Piece, read_pieces, source_files
from hope_jax.training.vocabulary import Vocabulary

VERSION = 1  # of what is written
FACTS = "facts.json"
VALIDATION_SHARE = 0.05  # of the documents, chosen by a hash of their text
VALIDATION_TOKENS = 1 << 20  # no document is held out beyond these
BATCH = 1 << 20  # characters that are tokenised together
INGEST_SECONDS = 24 * 3600  # how long the processes wait for the one that is slowest to read the text


def ingest(name: str, column: str, vocabulary: Vocabulary, say: Callable[[str], None] = lambda line: None) -> Corpus:
    """A source as a corpus on the disk, tokenised unless it was before.

    Args:
      name: a file, folder or pattern, or "hub:NAME" (see `sources.py`).
      column: of a table, the one that holds the text.
      vocabulary: what the tokens are.
      say: is told when the source must be read.
    Returns:
      A `Corpus` of memory-mapped arrays; its documents were divided between training and validation.
    Raises:
      UserError: the source cannot be read or is empty, or the cache cannot be written.
    """
    folder = cache_dir() / f"{_word(name)}-{_key(name, column, vocabulary)}"
    try:
        if distributed.greatest(not (folder / FACTS).exists()):
            if distributed.is_first_at(folder):
                _provide(folder, name, column, vocabulary, say)
            distributed.barrier(f"reading {name}", INGEST_SECONDS)
            _provide(folder, name, column, vocabulary, say)  # where a disk does not show yet what another host wrote
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror}; set HOPE_JAX_CACHE to a folder that can be written"
        ) from error
    return _open(folder, name, vocabulary)


def _provide(folder: Path, name: str, column: str, vocabulary: Vocabulary, say: Callable[[str], None]) -> None:
    """Makes the folder unless it is there."""
    if (folder / FACTS).exists():
        return
    say(f"reading {name} into {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _build(building, name, read_pieces(name, column), vocabulary)
        _publish(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _word(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", Path(name).name).strip("-.")[:40] or "data"


def _key(name: str, column: str, vocabulary: Vocabulary) -> str:
    files: list[Any] = [name]
    if not name.startswith(HUB):
        stats = [(path, path.stat()) for path in source_files(name)]
        files = [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    values = [VERSION, files, column, vocabulary.digest]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _publish(building: Path, folder: Path) -> None:
    try:
        building.rename(folder)
    except OSError:
        if not (folder / FACTS).exists():  # otherwise another process was first, with the same
            raise


def _open(folder: Path, name: str, vocabulary: Vocabulary) -> Corpus:
    facts = json.loads((folder / FACTS).read_text())
    train, validation = (np.memmap(folder / f"{half}.bin", vocabulary.dtype, "r") for half in ("train", "validation"))
    starts = (np.load(folder / f"{half}.npy", allow_pickle=False) for half in ("train", "validation"))
    return Corpus(name, train, validation, *starts, facts=facts)


class _Half:
    """One of the two .bin files while it is written."""

    def __init__(self, folder: Path, name: str, vocabulary: Vocabulary):
        self.path, self.index = folder / f"{name}.bin", folder / f"{name}.npy"
        self.file: BinaryIO = self.path.open("wb")
        self.starts = array("q")
        self.tokens = self.bytes = 0
        self._width = vocabulary.dtype.itemsize

    def begin(self) -> None:
        self.starts.append(self.tokens)

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        self.file.write(tokens.tobytes())
        self.tokens += tokens.size
        self.bytes += text_bytes

    def move_tail(self, other: "_Half", dtype: np.dtype) -> None:
        """Gives the last document to the other half; of one that is longer than a tenth of all, the end."""
        self.file.flush()
        most = min(max(2, self.tokens // 10), VALIDATION_TOKENS)
        cut = max(self.starts[-1], self.tokens - most)
        if 0 < cut == self.starts[-1]:
            self.starts.pop()
        tail = np.fromfile(self.path, dtype, offset=cut * self._width)
        share = round(self.bytes * tail.size / self.tokens)  # of the bytes, as near as is known
        other.begin()
        other.add(tail, share)
        self.file.truncate(cut * self._width)
        self.tokens, self.bytes = cut, self.bytes - share


def _build(folder: Path, name: str, pieces: Iterator[Piece], vocabulary: Vocabulary) -> None:
    train, validation = _Half(folder, "train", vocabulary), _Half(folder, "validation", vocabulary)
    with train.file, validation.file:
        _write(pieces, vocabulary, train, validation)
        if not train.tokens:
            raise UserError(f"{name} holds no text; give a source with some text in it")
        if not validation.tokens:
            train.move_tail(validation, vocabulary.dtype)
        if not train.tokens:
            raise UserError(f"{name} is too short to hold some of it out for validation; give a longer source")
    facts: dict[str, Any] = {"vocabulary": vocabulary.name}
    for half in (train, validation):
        np.save(half.index, np.frombuffer(half.starts, np.int64), allow_pickle=False)
        tokens = np.memmap(half.path, vocabulary.dtype, "r") if half.tokens else np.zeros(0, vocabulary.dtype)
        digest, counts = _read_through(tokens, vocabulary.size)
        facts[half.index.stem] = {"tokens": half.tokens, "documents": len(half.starts), "bytes": half.bytes}
        facts[half.index.stem] |= {"sha256": digest, "seen": np.flatnonzero(counts).tolist()}
    (folder / FACTS).write_text(json.dumps(facts) + "\n")


def _read_through(tokens: np.ndarray, size: int) -> tuple[str, np.ndarray]:
    """Fingerprint of the tokens and how often each occurs."""
    digest, counts = hashlib.sha256(), np.zeros(size, np.int64)
    for first in range(0, tokens.size, BATCH):
        block = np.asarray(tokens[first : first + BATCH])
        digest.update(block.tobytes())
        counts += np.bincount(block, minlength=size)
    return digest.hexdigest(), counts


def _write(pieces: Iterator[Piece], vocabulary: Vocabulary, train: _Half, validation: _Half) -> None:
    end = np.array([] if vocabulary.end is None else [vocabulary.end], vocabulary.dtype)
    held_out: set[bytes] = set()  # a text that occurs twice lies on one side
    half, first = None, b""
    for batch in _batches(pieces):
        texts = [piece.text.replace("\0", "") for piece in batch]
        for text, piece, tokens in zip(texts, batch, vocabulary.encode(texts), strict=True):
            raw = text.encode("utf-8", "replace")
            if half is None:
                digest = hashlib.sha256(raw).digest()
                first = first or digest
                half = validation if _is_held_out(digest, first, held_out, validation.tokens) else train
                half.begin()
            half.add(tokens, len(raw))
            if piece.ends:
                half.add(end, 0)
                half = None


def _is_held_out(digest: bytes, first: bytes, held_out: set[bytes], tokens: int) -> bool:
    """By a hash of the text, so that the order of the documents does not matter; the first one always trains."""
    chosen = int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64 and digest != first
    if chosen and tokens < VALIDATION_TOKENS:
        held_out.add(digest)
    return digest in held_out


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
