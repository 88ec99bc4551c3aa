"""The embedded corpus: real text that every CPython carries, as train and validation bytes.

English prose is the language reference in `pydoc_data.topics`; code is the standard library's own sources.
The split is by document, never by window, and a document goes to one side as a whole:

- a topic of the reference repeats whole sections of others ("compound statements" holds "the if statement"),
  so topics that share a paragraph are one document, and a repeated paragraph is kept once;
- a source file is one document. Tables (encodings), generated files, tests and vendored packages are left
  out.

Documents are taken in the order of a hash of their name, so the result depends on the Python version and
nothing else (not on the machine, the directory order or the hash seed).
"""

import hashlib
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hope_jax.training.errors import UserError

VALIDATION_PROSE_BYTES = 32_000
VALIDATION_CODE_BYTES = 160_000
TRAIN_CODE_BYTES = 3_600_000
MIN_SHARED_PARAGRAPH = 60  # shorter paragraphs ("Example:") say nothing about where a text comes from
MAX_FILE_BYTES = 200_000
LEFT_OUT = {
    "__pycache__",
    "dist-packages",
    "distutils",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib-dynload",
    "lib2to3",
}
LEFT_OUT |= {"pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo"}
MACHINE_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")


HALVES = ("train", "validation")
ONE_DOCUMENT = np.zeros(1, np.int64)


class Document(NamedTuple):
    """A text that is never divided between training and validation."""

    name: str
    text: bytes


class Corpus(NamedTuple):
    """Training and validation text as tokens, one document after the other."""

    name: str
    train: np.ndarray  # [training tokens] uint8 (bytes), uint16 or uint32; mapped from the disk if it was ingested
    validation: np.ndarray  # [validation tokens]
    train_starts: np.ndarray = ONE_DOCUMENT  # [training documents] int64, where each begins
    validation_starts: np.ndarray = ONE_DOCUMENT  # [validation documents] int64
    facts: Mapping[str, Any] | None = None  # what was found out when it was ingested; None for bytes in memory

    @property
    def seen_bytes(self) -> list[int]:
        """The byte values (of a tokenised corpus: the tokens) that occur in the training text, ascending."""
        if self.facts is not None:
            return self.facts["train"]["seen"]
        return np.flatnonzero(np.bincount(self.train, minlength=256)).tolist()

    @property
    def sha256(self) -> str:
        """A fingerprint of both halves: a resumed run must read the same text."""
        if self.facts is not None:
            return hashlib.sha256("".join(self.facts[half]["sha256"] for half in HALVES).encode()).hexdigest()
        return hashlib.sha256(self.train.tobytes() + b"\0" + self.validation.tobytes()).hexdigest()

    def bytes(self, half: str) -> int:
        """Bytes of text in a half, "train" or "validation"; end tokens are none."""
        return self.facts[half]["bytes"] if self.facts is not None else getattr(self, half).size

    def describe(self) -> str:
        """One line with the sizes."""
        unit = "bytes" if self.facts is None else "tokens"
        return f"{self.name}: {self.train.size:,} training {unit}, {self.validation.size:,} validation {unit}"


def embedded_corpus() -> Corpus:
    """The embedded corpus of this Python: about 4 MB for training and 0.2 MB for validation.

    Returns:
      A `Corpus`; the same on every machine with the same Python version.
    Raises:
      UserError: this Python was installed without its sources.

    >>> corpus = embedded_corpus()
    >>> corpus.train.size > 1_000_000, corpus.validation.size > 100_000
    (True, True)
    """
    prose_train, prose_validation = split_documents(topic_documents(), VALIDATION_PROSE_BYTES)
    code_train, code_validation = split_documents(source_documents(), VALIDATION_CODE_BYTES, TRAIN_CODE_BYTES)
    return Corpus(
        name="embedded (Python's language reference and standard library)",
        train=join(prose_train + code_train),
        validation=join(prose_validation + code_validation),
        train_starts=starts(prose_train + code_train),
        validation_starts=starts(prose_validation + code_validation),
    )


def topic_documents(topics: Mapping[str, str] | None = None) -> list[Document]:
    """The language reference: topics that share a paragraph are one document, each paragraph kept once."""
    if topics is None:
        from pydoc_data import topics as reference

        topics = reference.topics
    paragraphs = {name: topics[name].strip().split("\n\n") for name in sorted(topics)}
    leader = {name: name for name in paragraphs}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    first_seen: dict[str, str] = {}
    for name, blocks in paragraphs.items():
        for block in filter(_is_telling, blocks):
            leader[find(name)] = find(first_seen.setdefault(block.strip(), name))

    merged: dict[str, list[str]] = {}
    written: set[str] = set()
    for name, blocks in paragraphs.items():
        for block in blocks:
            if _is_telling(block) and block.strip() in written:
                continue
            written.add(block.strip())
            merged.setdefault(find(name), []).append(block)
    return [Document(f"topic:{name}", "\n\n".join(blocks).encode()) for name, blocks in merged.items()]


def _is_telling(paragraph: str) -> bool:
    return len(paragraph.strip()) >= MIN_SHARED_PARAGRAPH


def source_documents(root: Path | None = None) -> list[Document]:
    """The standard library's source files, one document each, named by their path below `root`."""
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    documents, contents = [], set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if LEFT_OUT.intersection(relative.parts) or path.name.startswith(MACHINE_FILES):
            continue
        text = path.read_bytes()
        if not 0 < len(text) <= MAX_FILE_BYTES or text in contents or not is_text(text):
            continue
        contents.add(text)
        documents.append(Document(relative.as_posix(), text))
    if sum(len(document.text) for document in documents) < 2 * VALIDATION_CODE_BYTES:
        raise UserError(
            f"no standard library sources under {root}: this Python was installed without them; "
            "use another Python or give your own text with data=FILE"
        )
    return documents


def split_documents(
    documents: Iterable[Document], validation_bytes: int, train_bytes: int | None = None
) -> tuple[list[Document], list[Document]]:
    """Fills validation, then training, with whole documents in the order of the hash of their names.

    Args:
      documents: in any order.
      validation_bytes, train_bytes: bounds that neither side exceeds; None takes everything.
    Returns:
      (training documents, validation documents), disjoint.
    """
    ordered = sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest())
    validation, rest = _fill(ordered, validation_bytes)
    train, _ = _fill(rest, train_bytes)
    return train, validation


def _fill(documents: list[Document], bound: int | None) -> tuple[list[Document], list[Document]]:
    taken: list[Document] = []
    left: list[Document] = []
    size = 0
    for document in documents:
        fits = bound is None or size + len(document.text) <= bound
        (taken if fits else left).append(document)
        size += len(document.text) if fits else 0
    return taken, left


def join(documents: list[Document]) -> np.ndarray:
    """The texts one after the other, uint8."""
    return np.frombuffer(b"\n".join(document.text for document in documents), dtype=np.uint8)


def starts(documents: list[Document]) -> np.ndarray:
    """Where each document begins in `join(documents)`, int64."""
    sizes = [len(document.text) + 1 for document in documents]
    return np.cumsum([0, *sizes[:-1]], dtype=np.int64)


def is_text(data: bytes) -> bool:
    """Whether `data` is UTF-8 without NUL bytes, which is what we call text."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in data


def read_text(path: str | Path) -> bytes:
    """The bytes of a text file.

    Raises:
      UserError: the file is missing, a directory, unreadable, empty or not UTF-8 text; the message says what
        to do.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no such file: {path}; give the path of a UTF-8 text file")
    if path.is_dir():
        raise UserError(f"{path} is a directory; give one text file (for example: cat {path}/*.txt > all.txt)")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    if not data:
        raise UserError(f"{path} is empty; give a text file with some text in it")
    if not is_text(data):
        raise UserError(f"{path} is not UTF-8 text (it looks binary); convert it first, for example with iconv")
    return data


def file_corpus(path: str | Path, validation_fraction: float = 0.1) -> Corpus:
    """A text file as a corpus: the last tenth is held out, in one piece.

    Raises:
      UserError: see `read_text`.
    """
    data = np.frombuffer(read_text(path), dtype=np.uint8)
    cut = data.size - max(1, int(data.size * validation_fraction))
    return Corpus(name=str(path), train=data[:cut], validation=data[cut:])


def load_corpus(data: str) -> Corpus:
    """A corpus in memory: "embedded" or the path of a text file."""
    return embedded_corpus() if data == "embedded" else file_corpus(data)
