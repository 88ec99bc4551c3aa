"""Reading texts of any length piece by piece with a carried state, and answering greedily from where they end.

One piece of tokens and one state are in memory at a time, however long the text. Every piece but the last has `size`
tokens, a multiple of all clocks of the model, so that each begins at a boundary: the compiled program of the second
piece is that of all later ones.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.models import LM, ModelConfig, build_lm


class Reader(NamedTuple):
    """A model that reads pieces."""

    size: int  # tokens of every piece but the last, which may be shorter
    read: Callable[[Any, Iterable[np.ndarray]], Iterator[tuple[Any, jax.Array]]]
    # (params, pieces [B, C]) -> after each piece the state and its logits [B, C, V]
    answer: Callable[[Any, Any, jax.Array, int], np.ndarray]
    # (params, state, logits [B, V], count) -> [B, count] tokens, each the likeliest after those before


def reader(config: ModelConfig, least: int | None = None) -> Reader:
    """A `Reader` of the model; pieces have `least` tokens or a few more.

    By default 256, with an attention cache 64: each token of a piece has a score for every slot of the cache.

    >>> reader(ModelConfig(chunk_proj=4, chunk_mem=12)).size
    264
    """
    least = least or (64 if config.architecture.cache else 256)
    lm = build_lm(config)
    clocks = math.lcm(config.chunk_proj, config.chunk_mem, *config.fast_chunks)
    size = -(-least // clocks) * clocks
    start = jax.jit(lm.init_state, static_argnums=1)
    apply = jax.jit(lm.apply, static_argnames="phase")

    def read(params: Any, pieces: Iterable[np.ndarray]) -> Iterator[tuple[Any, jax.Array]]:
        state, count = None, 0
        for piece_BC in pieces:
            state = start(params, len(piece_BC)) if state is None else state
            # Attention caches count every token, so their program knows no clock. All others count within a chunk.
            phase = None if config.architecture.cache else min(count, size)
            # Waiting keeps the pieces of later calls out of memory.
            state, logits_BCV = jax.block_until_ready(apply(params, state, jnp.asarray(piece_BC), phase=phase))
            count += piece_BC.shape[1]
            yield state, logits_BCV

    @functools.partial(jax.jit, static_argnums=3)
    def generate(params: Any, state: Any, logits_BV: jax.Array, count: int) -> jax.Array:
        return greedy(lm, params, state, logits_BV, count)

    def answer(params: Any, state: Any, logits_BV: jax.Array, count: int) -> np.ndarray:
        return np.asarray(generate(params, state, logits_BV, count))

    return Reader(size, read, answer)


def greedy(lm: LM, params: Any, state: Any, logits_BV: jax.Array, count: int) -> jax.Array:
    """[B, count] tokens, each the likeliest after those before; `logits_BV` are those of the last token read."""

    def step(carry, _):
        state, token_B = carry
        state, logits_B1V = lm.apply(params, state, token_B[:, None], phase=None)
        return (state, logits_B1V[:, 0].argmax(axis=-1).astype(jnp.int32)), token_B

    first_B = logits_BV.argmax(axis=-1).astype(jnp.int32)
    return jax.lax.scan(step, (state, first_B), length=count)[1].T


def split(tokens_BT: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """A text that is in memory anyway, in pieces.

    >>> [piece.shape for piece in split(np.zeros((2, 10)), 4)]
    [(2, 4), (2, 4), (2, 2)]
    """
    for begin in range(0, tokens_BT.shape[1], size):
        yield tokens_BT[:, begin : begin + size].astype(np.int32)


def answers(reader: Reader, params: Any, pieces: Iterable[np.ndarray], count: int) -> np.ndarray:
    """[B, count] tokens: what the model says after the last piece."""
    last = None
    for state, logits_BCV in reader.read(params, pieces):
        last = state, logits_BCV[:, -1]
    if last is None:
        raise ValueError("there is nothing to read: no piece came")
    return reader.answer(params, *last, count)
