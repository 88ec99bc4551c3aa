"""Losses of rows that hold several documents: the fast state starts afresh where one begins, exactly.

A model with a memory reads a row in segments of equal length, and before a segment in which a document begins its
state is reset: nothing of the document before is in it, and no gradient goes back across. Full attention reads the
row at once and compares document numbers instead.

The chunk-parallel paths need to know where all rows are in their chunks. Segments end where every chunk does, so a
memory is always at a boundary. A level that adapts in the sequence is not: its last chunk waits for the token after
it, except in a fresh row. So such a model reads a segment twice where a document begins in some row, as a fresh row
and as one that goes on, and each row takes its own. With full attention besides it goes token by token.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hope_jax.models import ModelConfig
from hope_jax.training.packing import Batch


def cross_entropy(logits_BTV: jax.Array, targets_BT: Any) -> jax.Array:
    """Nats of each target, [B, T] float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV.astype(jnp.float32), targets_BT)


def document_losses(
    lm: Any, model: ModelConfig, params: Any, state: Any, batch: Batch, losses: Callable = cross_entropy
) -> tuple[Any, jax.Array]:
    """Nats of each next token.

    Args:
      lm: the model's functions.
      model: its config.
      params: its parameters.
      state: of the rows before this batch; of rows that have read nothing when full attention reads them.
      batch: `starts` flags the segments before which a row is reset.
      losses: (what the model returns, targets) -> [B, T].
    Returns:
      (state after the batch, [B, T] float32); losses where `batch.weights` is zero mean nothing.
    """
    mask_BT = batch.weights > 0
    tokens_BT, targets_BT = batch.tokens.astype(jnp.int32), batch.targets.astype(jnp.int32)
    if model.architecture.cache and not model.fast_chunks:
        places = batch.tokens.shape[1] // batch.starts.shape[1]
        number_BT = jnp.repeat(1 + jnp.cumsum(batch.starts, axis=1, dtype=jnp.int32), places, axis=1)
        number_BT = jnp.where(mask_BT, number_BT, 0)
        state, logits_BTV = lm.apply(params, state, tokens_BT, phase=0, mask_BT=number_BT)
        return state, losses(logits_BTV, targets_BT)
    segments = batch.starts.shape[1]
    length = batch.tokens.shape[1] // segments
    whole = all(length % chunk == 0 for chunk in (model.chunk_proj, model.chunk_mem, *model.fast_chunks))
    waits = whole and bool(model.fast_chunks) and not model.architecture.cache

    def read(state, segment):
        tokens_BG, targets_BG, mask_BG, start_B = segment

        def apply(state, phase):
            return lm.apply(params, state, tokens_BG, phase=phase, mask_BT=mask_BG)

        def read_both_ways(state):
            fresh = apply(lm.init_state(params, start_B.shape[0]), 0)
            return jax.tree.map(lambda new, old: jnp.where(_rows(start_B, old), new, old), fresh, apply(state, length))

        if waits:
            after = jax.lax.cond(start_B.any(), read_both_ways, lambda state: apply(state, length), state)
        else:
            after = apply(lm.reset(params, state, start_B), 0 if whole and not model.fast_chunks else None)
        state, logits_BGV = after
        return state, losses(logits_BGV, targets_BG)

    def cut(x_BT):  # [B, T] -> [S, B, T / S]
        return jnp.swapaxes(x_BT.reshape(x_BT.shape[0], segments, -1), 0, 1)

    xs = (cut(tokens_BT), cut(targets_BT), cut(mask_BT), batch.starts.T)
    state, losses_SBG = jax.lax.scan(read, state, xs)
    return state, jnp.swapaxes(losses_SBG, 0, 1).reshape(mask_BT.shape)


def _rows(flag_B: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(flag_B, tuple(range(1, like.ndim)))
