"""Reading with a fast level that is written or not, chunk by chunk and row by row (spec 7.8, 11.1).

A chunk is written when the first token after it is read. By then its loss is known, so a gate of `hope_jax.online` can
decide. A row whose gate is shut reads on with the weights it has; its attention or memory state goes on as ever, and so
does the clock.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import text
from experiments.streaming import split
from hope_jax.models import ModelConfig, build_lm
from hope_jax.online import Gate
from hope_jax.training.documents import cross_entropy
from hope_jax.training.errors import UserError

nats_of = jax.jit(cross_entropy)
NO_STEP = 1e-30  # a learning rate that no float32 weight feels


class Reading(NamedTuple):
    """What came of reading."""

    bits_T: np.ndarray  # [T] bits per byte of each place, the mean over rows
    written: float  # share of the chunks that could be written


def first(count: int) -> Gate:
    """The first `count` chunks, then none.

    >>> gate = first(1)
    >>> state, write = gate.update(gate.init(), jnp.float32(2.0))
    >>> bool(write), bool(gate.update(state, jnp.float32(2.0))[1])
    (True, False)
    """
    return Gate(f"first:{count}", lambda: jnp.int32(0), lambda read, surprise: (read + 1, read < count))


def gated_reader(config: ModelConfig) -> Callable[[Any, np.ndarray, Gate], Reading]:
    """(params, windows [B, T + 1], gate) -> `Reading`, for a model with one fast level; each row has its own state.

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
        rows = len(windows_BT)
        state, write_B = start(params, rows), np.ones(rows, bool)
        gates = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows, *jnp.shape(leaf))), gate.init())
        opened = jax.jit(jax.vmap(gate.update))
        bits: list[np.ndarray] = []  # [C] of each place of each chunk
        writes: list[np.ndarray] = []
        nats_BC = None  # of the chunk before
        for tokens_BC, targets_BC in zip(split(batch.tokens, size), split(batch.targets, size), strict=True):
            if nats_BC is not None:
                gates, write_B = opened(gates, nats_BC.mean(axis=1))
                writes.append(np.asarray(write_B))
            phase = None if config.architecture.cache else size * (nats_BC is not None)  # as in `streaming`
            state, logits = step(params, state, jnp.asarray(tokens_BC), jnp.asarray(write_B), phase=phase)
            nats_BC = nats_of(logits, jnp.asarray(targets_BC))
            bits.append(np.asarray(nats_BC).mean(axis=0) / math.log(2))
        return Reading(np.concatenate(bits), float(np.mean(writes)) if writes else 0.0)

    return read
