"""A chunked model as an ordinary one: a stream in calls of any length, with the open chunk's tokens in the state.

The unit of the nest is one chunk of the fastest level, not one token: cutting such a chunk in two would make its first
half a constant for its second and change the write. Tokens of an unfinished chunk wait in `FastState.tokens_BC`, and a
chunk is written once the token after it, its last target, has been read. That token is also the first that may see
the new weights, so streaming and training give the same logits.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .chunked import chunked, cut_chunks
from .config import ModelConfig
from .functional import Params
from .lm import LM, check_call, reset_rows, skeleton


class FastState(NamedTuple):
    """State of a model with fast levels; C is the fastest level's chunk size."""

    nest: Any  # [B, ...] fast weights, pending errors, and the model's state at the start of the open chunk
    ahead: Any  # [B, ...] the model's state after the open chunk's tokens so far
    tokens_BC: jax.Array  # [B, C] int32, the open chunk
    mask_BC: jax.Array  # [B, C] bool, False at padding
    filled_B: jax.Array  # [B] int32, tokens in the open chunk; it stays full until the next token is read


def with_fast_levels(config: ModelConfig, eta: jax.Array | None = None) -> LM:
    """The model of `config` with the levels of `config.fast_chunks` written in context.

    Each row has its own fast weights. They start at the parameters, so the outer gradient reaches those
    directly and through every write; `config.bptt_chunks` truncates it per level.

    Args:
      config: has at least one fast level.
      eta: in the place of `config.cms_eta`, a number that may be traced: one program for many learning rates.

    Returns:
      `LM(init, init_state, apply, reset)`. `apply` reads inputs only: the target of a token is the next one.
      A masked token, or one whose next token is masked, teaches nothing; both advance the clocks. With
      `phase=None` the chunks are written as soon as any row completes one, for the rows that did.

    Raises:
      ValueError: chunk sizes that do not divide, fastest first.

    Reference: paper (70) to (74); spec 6.2, 6.3, 6.5, 6.6.
    """
    model = chunked(config, eta)
    size = model.size

    def init_state(params: Params, batch_size: int) -> FastState:
        start = model.init(params, batch_size)
        return FastState(
            nest=start,
            ahead=start.carry,
            tokens_BC=jnp.zeros((batch_size, size), jnp.int32),
            mask_BC=jnp.zeros((batch_size, size), bool),
            filled_B=jnp.zeros(batch_size, jnp.int32),
        )

    def known(params: Params, state: FastState, tokens_BT: jax.Array, mask_BT: jax.Array, phase: int):
        """A call that knows its clock: whole chunks, then the open one."""
        written = max(phase - 1, 0) // size
        held, new = phase - written * size, tokens_BT.shape[1]
        tokens_BT = jnp.concatenate([state.tokens_BC[:, :held], tokens_BT], axis=1)
        mask_BT = jnp.concatenate([state.mask_BC[:, :held], mask_BT], axis=1)
        count = max(held + new - 1, 0) // size
        end = count * size
        if count == 0:
            inner, rest = state.nest, (tokens_BT[:, held:], mask_BT[:, held:])
            ahead, logits_BTV = model.read(params, inner.levels, state.ahead, *rest, phase)
        else:
            chunks = cut_chunks(tokens_BT[:, : end + 1], mask_BT[:, : end + 1], count)
            inner, logits_BNCV = model.write(params, state.nest, chunks, written)
            head_BTV = logits_BNCV.reshape(tokens_BT.shape[0], end, -1)[:, held:]
            rest = (tokens_BT[:, end:], mask_BT[:, end:])
            ahead, tail_BTV = model.read(params, inner.levels, inner.carry, *rest, (written + count) * size)
            logits_BTV = jnp.concatenate([head_BTV, tail_BTV], axis=1)
        open_ = held + new - end
        room = ((0, 0), (0, size - open_))
        return FastState(
            inner,
            ahead,
            jnp.pad(tokens_BT[:, end:], room),
            jnp.pad(mask_BT[:, end:], room),
            jnp.full_like(state.filled_B, open_),
        ), logits_BTV

    def step(params: Params, state: FastState, token_B: jax.Array, mask_B: jax.Array):
        """One token for every row, each at its own place in its chunk."""
        due_B = state.filled_B == size

        def close(inner):
            tokens = jnp.concatenate([state.tokens_BC, token_B[:, None]], axis=1)
            mask = jnp.concatenate([state.mask_BC, mask_B[:, None]], axis=1)
            after, _ = model.write(params, inner, cut_chunks(tokens, mask, 1), None)
            return jax.tree.map(lambda a, b: jnp.where(_rows(due_B, a), a, b), after, inner)

        inner = jax.lax.cond(jnp.any(due_B), close, lambda inner: inner, state.nest)
        ahead, logits_B1V = model.read(params, inner.levels, state.ahead, token_B[:, None], mask_B[:, None], None)
        place_B = jnp.where(due_B, 0, state.filled_B)
        rows = jnp.arange(token_B.shape[0])
        tokens_BC = jnp.where(due_B[:, None], 0, state.tokens_BC).at[rows, place_B].set(token_B)
        mask_BC = jnp.where(due_B[:, None], False, state.mask_BC).at[rows, place_B].set(mask_B)
        return FastState(inner, ahead, tokens_BC, mask_BC, place_B + 1), logits_B1V[:, 0]

    def apply(
        params: Params,
        state: FastState,
        tokens_BT: jax.Array,
        *,
        phase: int | None = None,
        mask_BT: jax.Array | None = None,
    ) -> tuple[FastState, jax.Array]:
        check_call(state, tokens_BT, phase, mask_BT)
        tokens_BT = tokens_BT.astype(jnp.int32)
        mask_BT = jnp.ones(tokens_BT.shape, bool) if mask_BT is None else mask_BT
        if phase is not None:
            return known(params, state, tokens_BT, mask_BT, phase)
        state, logits_TBV = jax.lax.scan(lambda state, x: step(params, state, *x), state, (tokens_BT.T, mask_BT.T))
        return state, jnp.swapaxes(logits_TBV, 0, 1)

    return LM(skeleton(config).init, init_state, apply, reset_rows(init_state))


def _rows(flag_B: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(flag_B, tuple(range(1, like.ndim)))
