"""Text from a trained model: the prompt in one parallel pass, then one compiled step per byte (or token)."""

import codecs
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.models import ModelConfig
from hope_jax.training.errors import UserError
from hope_jax.training.vocabulary import BYTES, Vocabulary

SHOWN_UNSEEN = 8


def generate_bytes(
    lm: Any,
    params: Any,
    prompt: Sequence[int],
    *,
    seen_bytes: list[int],
    max_bytes: int,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
    end: int | None = None,
) -> Iterator[int]:
    """Streams a continuation.

    Args:
      lm: the model's functions.
      params: its parameters.
      prompt: at least one byte, or token of a tokenised model.
      seen_bytes: values (tokens) that occurred in training; no other is ever produced.
      max_bytes: how many to produce.
      temperature: of the distribution; 0 takes the most likely byte.
      top_k: only the k most likely bytes; 0 takes all.
      seed: of the sampling.
      end: the value that ends a document, and the continuation; it is not yielded.
    Yields:
      Byte values, or tokens.
    """
    state, logits_V = _prefill(lm, params, np.array([list(prompt)]))
    allowed_V = np.isin(np.arange(logits_V.size), seen_bytes)
    choose = functools.partial(choose_token, allowed_V=allowed_V, temperature=temperature, top_k=top_k)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, token, key):
        state, logits_BTV = lm.apply(params, state, token[None, None], phase=None)
        return state, choose(logits_BTV[0, -1], key)

    root = jax.random.key(seed)
    token = choose(logits_V, jax.random.fold_in(root, 0))
    for i in range(max_bytes):
        if int(token) == end:
            return
        yield int(token)
        if i + 1 < max_bytes:
            state, token = step(state, token, jax.random.fold_in(root, i + 1))


def _prefill(lm: Any, params: Any, tokens_BT: np.ndarray) -> tuple[Any, jax.Array]:
    """State after the prompt and logits of the next byte."""

    @jax.jit
    def prefill(tokens_BT):
        state, logits_BTV = lm.apply(params, lm.init_state(params, 1), tokens_BT.astype(jnp.int32), phase=0)
        return state, logits_BTV[0, -1]

    return prefill(tokens_BT)


def choose_token(
    logits_V: jax.Array, key: jax.Array, *, allowed_V: np.ndarray, temperature: float | jax.Array, top_k: int
) -> jax.Array:
    """A token [] drawn from logits [V]: one of the `top_k` (0: all) likeliest allowed ones."""
    logits_V = jnp.where(allowed_V, logits_V.astype(jnp.float32), -jnp.inf)
    if top_k:
        logits_V = jnp.where(logits_V < jax.lax.top_k(logits_V, min(top_k, logits_V.size))[0][-1], -jnp.inf, logits_V)
    if isinstance(temperature, float | int) and temperature == 0:
        return logits_V.argmax().astype(jnp.int32)
    return jax.random.categorical(key, logits_V / temperature).astype(jnp.int32)


class Decoding:
    """From tokens to text as soon as a character is complete; what is not UTF-8 becomes the replacement character.

    Args:
      vocabulary: what the tokens are.
      before: the tokens that they follow. Not shown, but decoded with them: what a token reads as may depend on the
        one before it, as a space does that the decoder leaves out at the beginning of a text.

    >>> from hope_jax.training.vocabulary import load_vocabulary
    >>> decoding = Decoding(load_vocabulary("bytes"))
    >>> [decoding.add(value) for value in "aé".encode()], decoding.end()
    (['a', '', 'é'], '')
    """

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int] = ()):
        self._vocabulary, self._tokens = vocabulary, list(before)
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if vocabulary.name == BYTES else None
        self._shown = 0 if self._bytes else len(vocabulary.decode(self._tokens))

    def add(self, token: int) -> str:
        """What is sure of the text with one more token and was not before."""
        if self._bytes:
            return self._bytes.decode(bytes([token]))
        self._tokens.append(token)
        text = self._vocabulary.decode(self._tokens)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # bytes that may become a character
            return ""
        new, self._shown = text[self._shown :], len(text)
        return new

    def end(self) -> str:
        """The rest, where no more tokens come."""
        return self._bytes.decode(b"", True) if self._bytes else self._vocabulary.decode(self._tokens)[self._shown :]


def token_pieces(values: Iterable[int], vocabulary: Vocabulary, before: Sequence[int] = ()) -> Iterator[str]:
    """Tokens as text, piece by piece (see `Decoding`)."""
    decoding = Decoding(vocabulary, before)
    yield from map(decoding.add, values)
    yield decoding.end()


def encode_prompt(prompt: str, vocabulary: Vocabulary, seen: list[int]) -> Sequence[int]:
    """The tokens of a prompt; the end token (or the first that was seen) for an empty one.

    Raises:
      UserError: of a byte-level model, see `check_prompt`.
    """
    if vocabulary.name == BYTES:
        return check_prompt(prompt.encode("utf-8", "surrogateescape"), seen)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt {prompt!r} is not UTF-8; this run reads text through a tokenizer") from error
    tokens = vocabulary.encode([prompt])[0].tolist()
    return tokens or [vocabulary.end if vocabulary.end in seen else seen[0]]


def check_prompt(prompt: bytes, seen_bytes: list[int]) -> bytes:
    """The prompt, or a newline for an empty one.

    Raises:
      UserError: it holds bytes that never occurred in training, which the model knows nothing about.
    """
    unseen = sorted(set(prompt).difference(seen_bytes))
    if unseen:
        names = ", ".join(f"0x{value:02X}" for value in unseen[:SHOWN_UNSEEN])
        more = f" and {len(unseen) - SHOWN_UNSEEN} more" if len(unseen) > SHOWN_UNSEEN else ""
        raise UserError(
            f"the prompt holds bytes that the model never saw in training: {names}{more}; "
            "leave them out, or train on text that has them with data=FILE"
        )
    return prompt or (b"\n" if 10 in seen_bytes else bytes(seen_bytes[:1]))


def check_length(model: ModelConfig, total: int) -> None:
    """Refuses a text that is longer than the attention cache; a recurrent memory has no such limit."""
    if model.architecture.cache and total > model.max_length:
        raise UserError(
            f"prompt and continuation are {total} bytes (or tokens) but the attention cache holds {model.max_length}; "
            "lower --max-bytes or shorten the prompt"
        )


def check_sampling(max_bytes: int, temperature: float, top_k: int, seed: int) -> None:
    """Refuses options of `hope generate` that are out of range."""
    for name, value, least in (
        ("max-bytes", max_bytes, 1),
        ("temperature", temperature, 0),
        ("top-k", top_k, 0),
    ):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} {value} must be a finite number")
        if not value >= least:
            raise UserError(f"--{name} {value} must be at least {least}")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed} must be 0 or greater and below 2**63")


def generate_text(
    run_dir: Path, prompt: str, *, max_bytes: int, temperature: float, top_k: int, seed: int
) -> Iterator[str]:
    """What `hope generate` prints, in pieces: the prompt, then the continuation as it is made.

    Raises:
      UserError: no such run, a prompt with unseen bytes, a text too long for attention, or a value out of
        range.
    """
    from hope_jax.training.load import load_run
    from hope_jax.training.run_dir import read_seen_bytes, run_vocabulary

    check_sampling(max_bytes, temperature, top_k, seed)
    seen_bytes = read_seen_bytes(run_dir)
    vocabulary = run_vocabulary(run_dir)
    checked = encode_prompt(prompt, vocabulary, seen_bytes)
    run = load_run(run_dir)
    check_length(run.config.model, len(checked) + max_bytes)
    values = generate_bytes(
        run.program.lm,
        run.state.params,
        checked,
        seen_bytes=seen_bytes,
        max_bytes=max_bytes,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        end=vocabulary.end,
    )
    yield prompt
    yield from token_pieces(values, vocabulary, checked if prompt else ())
