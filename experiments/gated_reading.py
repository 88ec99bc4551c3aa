"""Reading with a fast level that is written or not, chunk by chunk and row by row (spec 7.8, 11.1).

A chunk is written when the first token after it is read. By then its loss is known, so a gate can decide. A row whose
gate is shut reads on with the weights it has; its attention or memory state goes on as ever, and so does the clock.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import text
from experiments.streaming import split
from hope_jax.models import ModelConfig, build_lm
from hope_jax.training.errors import UserError

NO_STEP = 1e-30  # a learning rate that no float32 weight feels

type Gate = Callable[[np.ndarray], np.ndarray]  # [N, B] bits per byte of the chunks so far -> [B] write the last one?


class Reading(NamedTuple):
    """What came of reading."""

    bits_T: np.ndarray  # [T] bits per byte of each place, the mean over rows
    written: float  # share of the chunks that could be written


def always(bits_NB: np.ndarray) -> np.ndarray:
    """Every chunk."""
    return np.ones(bits_NB.shape[1], bool)


def first(count: int) -> Gate:
    """The first `count` chunks, then none.

    >>> [bool(first(1)(np.zeros((n, 1)))[0]) for n in (1, 2)]
    [True, False]
    """
    return lambda bits_NB: np.full(bits_NB.shape[1], len(bits_NB) <= count)


def above(threshold: float) -> Gate:
    """Chunks of more than `threshold` bits per byte.

    >>> above(2.0)(np.array([[9.0, 9.0], [1.5, 2.5]])).tolist()
    [False, True]
    """
    return lambda bits_NB: bits_NB[-1] > threshold


def surprising(decay: float = 0.9) -> Gate:
    """Chunks of more bits than the running mean (EMA) of those before; the first one too.

    >>> surprising(0.5)(np.array([[4.0, 4.0], [2.0, 2.0], [3.1, 2.9]])).tolist()
    [True, False]
    """

    def gate(bits_NB: np.ndarray) -> np.ndarray:
        mean_B = bits_NB[0]
        for bits_B in bits_NB[1:-1]:
            mean_B = decay * mean_B + (1 - decay) * bits_B
        return always(bits_NB) if len(bits_NB) == 1 else bits_NB[-1] > mean_B

    return gate


def budget(share: float) -> Gate:
    """About the hardest `share` of the chunks: those above this quantile of all so far.

    >>> budget(0.25)(np.array([[1.0, 5.0], [2.0, 6.0], [3.0, 7.0], [4.0, 4.0]])).tolist()
    [True, False]
    """
    return lambda bits_NB: bits_NB[-1] >= np.quantile(bits_NB, 1 - share, axis=0)


def gated_reader(config: ModelConfig) -> Callable[[Any, np.ndarray, Gate], Reading]:
    """(params, windows [B, T + 1], gate) -> `Reading`, for a model with one fast level.

    Both continuations of every row are computed and one is kept, so it costs twice what reading and learning costs.

    Raises:
      UserError: the model has no fast level, or several.
    """
    if len(config.fast_chunks) != 1:
        raise UserError(f"a gate opens one fast level; this model has the chunks {config.fast_chunks}")
    [size] = config.fast_chunks
    write, keep = build_lm(config), build_lm(dataclasses.replace(config, cms_eta=NO_STEP))
    start = jax.jit(write.init_state, static_argnums=1)

    def step(params: Any, state: Any, tokens_BC: jax.Array, write_B: jax.Array, phase: int | None):
        """One chunk; `write_B` says which rows write the one before."""

        def choose(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(jnp.expand_dims(write_B, tuple(range(1, new.ndim))), new, old)

        return jax.tree.map(choose, *(lm.apply(params, state, tokens_BC, phase=phase) for lm in (write, keep)))

    step = jax.jit(step, static_argnames="phase")

    def read(params: Any, windows_BT: np.ndarray, gate: Gate) -> Reading:
        batch = text.next_byte(windows_BT)
        state, write_B = start(params, len(windows_BT)), np.ones(len(windows_BT), bool)
        chunks: list[np.ndarray] = []  # [B] bits per byte of each
        places: list[np.ndarray] = []  # [C] of each place in it
        writes: list[np.ndarray] = []
        for tokens_BC, targets_BC in zip(split(batch.tokens, size), split(batch.targets, size), strict=True):
            if chunks:
                write_B = gate(np.stack(chunks))
                writes.append(write_B)
            phase = None if config.architecture.cache else size * bool(chunks)  # as in `streaming`
            state, logits = step(params, state, jnp.asarray(tokens_BC), jnp.asarray(write_B), phase=phase)
            bits_BC = np.asarray(bits_of(logits, jnp.asarray(targets_BC)))
            chunks.append(bits_BC.mean(axis=1))
            places.append(bits_BC.mean(axis=0))
        return Reading(np.concatenate(places), float(np.mean(writes)) if writes else 0.0)

    return read


@jax.jit
def bits_of(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """[B, T] bits of the targets."""
    nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV.astype(jnp.float32), targets_BT)
    return nats_BT / jnp.log(2)
