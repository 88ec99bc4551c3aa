"""What a token is: a byte, or an entry of a `tokenizers` JSON file.

A document is the tokens of its text and then one end token: byte 0, which no text holds, or the end token of the
tokenizer. A tokenizer without one ends its documents with nothing.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hope_jax.training.errors import UserError
from hope_jax.training.overrides import one_line

BYTES = "bytes"
TOKENIZER_FILE = "tokenizer.json"  # the run's own copy
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<|eos|>", "<eos>", "</s>", "[EOS]", "[SEP]")


class Vocabulary(NamedTuple):
    """From text to tokens and back."""

    name: str
    size: int  # tokens are below it
    end: int | None  # the token after a document
    dtype: np.dtype  # the smallest that holds a token
    digest: str  # equal where equal text gives equal tokens
    encode: Callable[[list[str]], list[np.ndarray]]  # without end tokens
    decode: Callable[[Sequence[int]], str]  # what is not UTF-8 becomes the replacement character


def load_vocabulary(tokenizer: str) -> Vocabulary:
    """The vocabulary that the configuration names: "bytes" or the path of a `tokenizers` JSON file.

    Raises:
      UserError: there is no such file, or it is not a tokenizer.

    >>> words = load_vocabulary("bytes")
    >>> words.decode(words.encode(["é"])[0].tolist()), words.size
    ('é', 256)
    """
    if tokenizer == BYTES:
        return Vocabulary(BYTES, 256, 0, np.dtype(np.uint8), BYTES, _encode_bytes, _decode_bytes)
    path = Path(tokenizer)
    if not path.is_file():
        raise UserError(f"no such file: tokenizer={tokenizer}; give a tokenizers JSON file, or tokenizer={BYTES}")
    from tokenizers import Tokenizer

    try:
        content = path.read_bytes()
        loaded = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises Exception itself
        raise UserError(
            f"tokenizer={tokenizer} is not a tokenizers JSON file ({one_line(error)}); "
            f"give the tokenizer.json of a model, or tokenizer={BYTES}"
        ) from error
    ids = loaded.get_vocab(with_added_tokens=True)
    size = max(ids.values(), default=-1) + 1
    if not size:
        raise UserError(f"tokenizer={tokenizer} has no tokens; train it first, or give tokenizer={BYTES}")
    dtype = np.dtype(np.uint8 if size <= 2**8 else np.uint16 if size <= 2**16 else np.uint32)

    def encode(texts: list[str]) -> list[np.ndarray]:
        encoded = loaded.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, dtype) for one in encoded]

    def decode(tokens: Sequence[int]) -> str:
        return loaded.decode(list(tokens), skip_special_tokens=False)

    end = next((ids[word] for word in END_TOKENS if word in ids), None)
    digest = hashlib.sha256(content).hexdigest()
    return Vocabulary(path.name, size, end, dtype, digest, encode, decode)


def _encode_bytes(texts: list[str]) -> list[np.ndarray]:
    return [np.frombuffer(text.encode("utf-8", "replace"), np.uint8) for text in texts]


def _decode_bytes(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode("utf-8", "replace")
