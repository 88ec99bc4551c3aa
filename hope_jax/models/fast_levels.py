"""Levels that adapt inside the sequence, as a wrapper around a model (spec 6.2 to 6.6).

The nest is outside the layers: its error function runs the whole model over one chunk of the fastest clock
and returns the gradient of the summed next-token loss with respect to each fast level's weights. What was
carried in from earlier chunks (caches, memories, convolution tails) is an argument of that gradient: constant
for the write, and still differentiable for the outer optimizer.

The unit of the nest is therefore one chunk of the fastest level, not one token: cutting such a chunk in two
would make its first half a constant for its second and change the write. Tokens of an unfinished chunk wait
in `FastState.tokens_BC`, and a chunk is written once the token after it, its last target, has been read. That
token is also the first that may see the new weights, so streaming and training give the same logits.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hope_jax import Nest, level, nest, nest_with_starts

from .config import ModelConfig
from .fast_weights import Weights, fast_weights
from .functional import Params
from .lm import LM, check_call, reset_rows, skeleton


class FastState(NamedTuple):
    """State of a model with fast levels; C is the fastest level's chunk size."""

    nest: Any  # [B, ...] fast weights, pending errors, and the model's state at the start of the open chunk
    ahead: Any  # [B, ...] the model's state after the open chunk's tokens so far
    tokens_BC: jax.Array  # [B, C] int32, the open chunk
    mask_BC: jax.Array  # [B, C] bool, False at padding
    filled_B: jax.Array  # [B] int32, tokens in the open chunk; it stays full until the next token is read


class Chunks(NamedTuple):
    """Whole chunks that are ready to be written."""

    tokens_BNC: jax.Array
    target_BNC: jax.Array  # the next tokens
    mask_BNC: jax.Array  # the token is real
    taught_BNC: jax.Array  # the token and its target are real


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
    model = skeleton(config)
    size, start_weights = config.fast_chunks[0], fast_weights(config).take
    nested = functools.partial(_nest, config, model, config.cms_eta if eta is None else eta)
    nested({})  # refuse bad chunk sizes now, not at the first call

    def init_state(params: Params, batch_size: int) -> FastState:
        carry = model.init_state(params, batch_size)
        start = jax.vmap(lambda row: nested(params).init(start_weights(params), row))(carry)
        return FastState(
            nest=start._replace(phase=jnp.zeros(batch_size, jnp.int32)),
            ahead=carry,
            tokens_BC=jnp.zeros((batch_size, size), jnp.int32),
            mask_BC=jnp.zeros((batch_size, size), bool),
            filled_B=jnp.zeros(batch_size, jnp.int32),
        )

    def read(params: Params, state: Any, carry: Any, tokens_BT: jax.Array, mask_BT: jax.Array, phase: int | None):
        """Run the model over tokens with each row's fast weights: the new carry and the logits."""

        def row(levels, carry, tokens_T, mask_T):
            weights = _current(config, levels)
            return _run(config, model, params, weights, carry, tokens_T, mask_T, phase)

        return jax.vmap(row)(state.levels, carry, tokens_BT, mask_BT)

    def write(params: Params, state: Any, chunks: Chunks, phase: int | None):
        """Step the nest over whole chunks, `phase` of which were written before: its state and the logits."""
        return jax.vmap(lambda row, xs: nested(params).apply(row, xs, phase))(state, chunks)

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
            ahead, logits_BTV = read(params, inner, state.ahead, *rest, phase)
        else:
            chunks = _chunks(tokens_BT[:, : end + 1], mask_BT[:, : end + 1], count)
            inner, logits_BNCV = write(params, state.nest, chunks, written)
            head_BTV = logits_BNCV.reshape(tokens_BT.shape[0], end, -1)[:, held:]
            rest = (tokens_BT[:, end:], mask_BT[:, end:])
            ahead, tail_BTV = read(params, inner, inner.carry, *rest, (written + count) * size)
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
            after, _ = write(params, inner, _chunks(tokens, mask, 1), None)
            return jax.tree.map(lambda a, b: jnp.where(_rows(due_B, a), a, b), after, inner)

        inner = jax.lax.cond(jnp.any(due_B), close, lambda inner: inner, state.nest)
        ahead, logits_B1V = read(params, inner, state.ahead, token_B[:, None], mask_B[:, None], None)
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

    return LM(model.init, init_state, apply, reset_rows(init_state))


def _nest(config: ModelConfig, model: LM, eta: float | jax.Array, params: Params) -> Nest:
    """The nest of one row around the model with these parameters; its clock counts the fastest chunks."""
    sizes, size = config.fast_chunks, config.fast_chunks[0]
    truncation = (*config.bptt_chunks, *(None for _ in sizes))
    levels = [
        level(None, optax.sgd(eta / tokens), tokens // size, bptt_chunks=writes)
        for tokens, writes in zip(sizes, truncation, strict=False)
    ]
    phase = _phase_of_chunks(config)

    def error(weights: Weights, carry: Any, chunk: Chunks):
        tokens_C, target_C, mask_C, taught_C = (leaf[0] for leaf in chunk)

        def loss(weights: Weights, carry: Any):
            carry, logits_CV = _run(config, model, params, weights, carry, tokens_C, mask_C, phase)
            log_p_C = jnp.take_along_axis(jax.nn.log_softmax(logits_CV), target_C[:, None], axis=1)[:, 0]
            return -jnp.sum(jnp.where(taught_C, log_p_C, 0)), (carry, logits_CV)

        errors, (carry, logits_CV) = jax.grad(loss, has_aux=True)(weights, carry)
        return errors, carry, logits_CV[None]

    make = functools.partial(nest_with_starts, meta=config.cms_meta) if config.cms_variant == "nested" else nest
    return make(*levels, error=error, remat=config.remat != "none")


def _current(config: ModelConfig, levels: tuple[Any, ...]) -> Weights:
    """The weights that read, from the states of the nest's levels; nested levels lie between their start states."""
    return tuple(one.start for one in (levels[::2] if config.cms_variant == "nested" else levels))


def _phase_of_chunks(config: ModelConfig) -> int | None:
    """What the model is told about its clock at the start of a chunk: 0 if its memories are at a boundary."""
    at_boundary = config.fast_chunks[0] % max(config.chunk_proj, config.chunk_mem) == 0
    return 0 if config.name == "hope" and at_boundary else None


def _run(
    config: ModelConfig,
    model: LM,
    params: Params,
    weights: Weights,
    carry: Any,
    tokens_T: jax.Array,
    mask_T: jax.Array,
    phase: int | None,
) -> tuple[Any, jax.Array]:
    """The model on one row with these fast weights."""
    carry = jax.tree.map(lambda leaf: leaf[None], carry)
    params = fast_weights(config).put(params, weights)
    carry, logits_BTV = model.apply(params, carry, tokens_T[None], phase=phase, mask_BT=mask_T[None])
    return jax.tree.map(lambda leaf: leaf[0], carry), logits_BTV[0]


def _chunks(tokens_BT: jax.Array, mask_BT: jax.Array, count: int) -> Chunks:
    """Cut `count * C + 1` tokens into chunks with their targets."""

    def cut(x_BT: jax.Array) -> jax.Array:
        return x_BT.reshape(x_BT.shape[0], count, -1)

    taught_BT = mask_BT[:, :-1] & mask_BT[:, 1:]
    return Chunks(cut(tokens_BT[:, :-1]), cut(tokens_BT[:, 1:]), cut(mask_BT[:, :-1]), cut(taught_BT))


def _rows(flag_B: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(flag_B, tuple(range(1, like.ndim)))
