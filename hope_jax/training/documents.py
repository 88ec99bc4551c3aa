"""Losses of rows that hold several documents: the fast state starts afresh where one begins, exactly.

A model with a memory reads a row in segments of equal length, and before a segment in which a document begins its
state is reset: nothing of the document before is in it, and no gradient goes back across. Full attention reads the
row at once and compares document numbers instead.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hope_jax.models import ModelConfig
from hope_jax.training.packing import Batch


def document_losses(lm: Any, model: ModelConfig, params: Any, state: Any, batch: Batch) -> tuple[Any, jax.Array]:
    """Nats of each next token.

    Args:
      lm: the model's functions.
      model: its config.
      params: its parameters.
      state: of the rows before this batch; of rows that have read nothing when full attention reads them.
      batch: `starts` flags the segments before which a row is reset.
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
        return state, _cross_entropy(logits_BTV, targets_BT)
    segments = batch.starts.shape[1]
    phase = _phase(model, batch.tokens.shape[1] // segments)

    def read(state, segment):
        tokens_BG, targets_BG, mask_BG, start_B = segment
        state = lm.reset(params, state, start_B)
        state, logits_BGV = lm.apply(params, state, tokens_BG, phase=phase, mask_BT=mask_BG)
        return state, _cross_entropy(logits_BGV, targets_BG)

    def cut(x_BT):  # [B, T] -> [S, B, T / S]
        return jnp.swapaxes(x_BT.reshape(x_BT.shape[0], segments, -1), 0, 1)

    xs = (cut(tokens_BT), cut(targets_BT), cut(mask_BT), batch.starts.T)
    state, losses_SBG = jax.lax.scan(read, state, xs)
    return state, jnp.swapaxes(losses_SBG, 0, 1).reshape(mask_BT.shape)


def _phase(model: ModelConfig, length: int) -> int | None:
    """What the model is told about its clocks at the start of a segment: at a boundary, when all its chunks end there.

    An open chunk of a level that adapts in the sequence waits for the token after it, so its rows differ: None.
    """
    if model.fast_chunks:
        return None
    return 0 if length % model.chunk_proj == 0 and length % model.chunk_mem == 0 else None


def _cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV.astype(jnp.float32), targets_BT)
