"""A text file as what comes next in a stream: it is read while it is learned, and may be of any length."""

import codecs
import itertools
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hope_jax.online.reading import pieces
from hope_jax.online.session import Session
from hope_jax.online.stream import TOKENS_A_CALL
from hope_jax.training.errors import UserError
from hope_jax.training.vocabulary import BYTES

MOST_TOKENISED = 1 << 24  # characters of a file for a tokenizer, which reads all of them at once
BLOCK = 1 << 20  # bytes that are checked together
# Line ends as they are; bytes that are not UTF-8 are half characters, which a tokenizer refuses.
AS_TEXT = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


class TextFile(NamedTuple):
    """A file that can be read."""

    path: Path
    size: int | None  # bytes; None: a pipe, which does not say


def check_text(path: Path) -> TextFile:
    """A text file, looked through before anything of it is learned. A pipe, which is read only once, is not.

    Raises:
      UserError: there is none, it is empty, or it is not UTF-8.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise _unreadable(path, error) from error
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        return TextFile(path, None)
    decoder, size = codecs.getincrementaldecoder("utf-8")(), 0
    for block in itertools.chain(_blocks(path, BLOCK, mode="rb"), [b""]):
        begun = len(decoder.getstate()[0])  # bytes of a character that goes on in this block
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 (byte {size - begun + error.start}); convert it first") from error
        size += len(block)
    return TextFile(path, size)


def file_pieces(session: Session, text: TextFile) -> tuple[Iterator[np.ndarray], int | None]:
    """The tokens of a file in pieces: observed one after another they are the whole text, to the bit.

    Args:
      session: that will observe them. For a byte model no more of the file is in memory than a piece, and a pipe's
        piece is what it has by then. A tokenizer is given the whole text, for what it makes of a part depends on what
        surrounds it; so that file must be short, and a pipe is read to its end before anything is learned.
      text: the file.
    Returns:
      The pieces, and about how many tokens they are; None: a pipe does not say.
    Raises:
      UserError: the file is too long for a tokenizer, or not UTF-8. The pieces raise it too: the file cannot be read
        any more, or the pipe was empty.

    Example:
      >>> import tempfile
      >>> import jax
      >>> from hope_jax.models import ModelConfig, build_lm
      >>> config = ModelConfig(name="hope_attention", dim=16, layers=1, cms_hidden=(32,), cms_chunks=(16,))
      >>> session = Session(config, build_lm(config).init(jax.random.key(0)))
      >>> with tempfile.NamedTemporaryFile() as file:
      ...     _ = file.write(b"abc " * 500), file.flush()
      ...     found, tokens = file_pieces(session, check_text(Path(file.name)))
      ...     [len(piece) for piece in found], tokens
      ([1024, 976], 2000)
    """
    if session.vocabulary.name == BYTES:
        parts = _blocks(text.path, TOKENS_A_CALL, mode="rb", buffering=0)  # a read does not wait for more
        return (np.frombuffer(part, np.uint8) for part in parts), text.size
    whole = next(_blocks(text.path, MOST_TOKENISED + 1, **AS_TEXT))
    if len(whole) > MOST_TOKENISED:
        raise UserError(
            f"{text.path} has more than {MOST_TOKENISED:,} characters, and this model reads text through a tokenizer, "
            "all at once; split it (split -C 16M) and give one part after the other"
        )
    tokens = pieces(session, whole)
    return iter(tokens), sum(map(len, tokens))


def _blocks(path: Path, size: int, **options: Any) -> Iterator[Any]:
    """The content of a file, so much at a time."""
    empty = True
    try:
        with path.open(**options) as file:
            while block := file.read(size):
                empty = False
                yield block
    except OSError as error:
        raise _unreadable(path, error) from error
    if empty:
        raise UserError(f"{path} is empty; give a file with text")


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot read {path}: {error.strerror}")
