"""From text to the tokens of a stream."""

from collections.abc import Sequence

import numpy as np

from hope_jax.training.errors import UserError
from hope_jax.training.vocabulary import BYTES, Vocabulary

type Text = str | bytes | Sequence[int] | np.ndarray  # text, bytes or tokens


def tokens_of(text: Text, vocabulary: Vocabulary, vocab_size: int) -> np.ndarray:
    """The tokens [n] of a text.

    Args:
      text: text, bytes or tokens. Bytes that are not UTF-8 are bytes like any other where tokens are bytes.
      vocabulary: of the model.
      vocab_size: V, tokens that the model has.

    Raises:
      UserError: tokens that the model does not have, or text that its tokenizer cannot read.

    Example:
      >>> from hope_jax.training.vocabulary import load_vocabulary
      >>> tokens_of("hé", load_vocabulary("bytes"), 256).tolist()
      [104, 195, 169]
    """
    if isinstance(text, bytes):
        text = np.frombuffer(text, np.uint8) if vocabulary.name == BYTES else text.decode("utf-8", "replace")
    if isinstance(text, str):
        try:
            text = vocabulary.encode([text])[0]
        except TypeError as error:  # a tokenizer takes no lone surrogates
            raise UserError(f"the text {text!r:.80} is not UTF-8; this model reads text through a tokenizer") from error
    tokens = np.asarray(text)
    if not tokens.size:
        return tokens.astype(np.int32).reshape(-1)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"tokens are a sequence of integers; got {tokens.dtype} of shape {list(tokens.shape)}")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise UserError(f"tokens are 0 to {vocab_size - 1}; got {tokens.min()} to {tokens.max()}")
    return tokens
