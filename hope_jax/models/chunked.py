"""A model and the levels that are written after every chunk of its stream, in whole chunks (spec 6.2 to 6.6).

The nest is outside the layers: its error function runs the whole model over one chunk of the fastest clock
and returns the gradient of the summed next-token loss with respect to each fast level's weights. What was
carried in from earlier chunks (caches, memories, convolution tails) is an argument of that gradient: constant
for the write, and still differentiable for the outer optimizer.

Who reads token by token keeps the tokens of an open chunk: `fast_levels.py` for training and generation,
`hope_jax/online/` for streams that are learned from.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hope_jax import Nest, NestState, level, nest, nest_with_starts

from .config import ModelConfig
from .fast_weights import Weights, fast_weights
from .functional import Params
from .lm import LM, skeleton

LEAST_CHUNK = 32  # tokens of a chunk of a model without fast levels, whose chunks are only pieces


class Chunks(NamedTuple):
    """Whole chunks that are ready to be written."""

    tokens_BNC: jax.Array
    target_BNC: jax.Array  # the next tokens
    mask_BNC: jax.Array  # the token is real
    taught_BNC: jax.Array  # the token and its target are real


class Chunked(NamedTuple):
    """A model as functions over whole chunks; every array of a state has the batch axis first.

    The state is a `NestState`: the fast levels, the model's own state as the carry, and each row's clock.
    """

    size: int  # C, tokens of a chunk
    init: Callable[[Params, int], NestState]
    read: Callable[..., tuple[Any, jax.Array]]
    # (params, levels, carry, tokens_BT, mask_BT, phase) -> (carry, logits_BTV): nothing is written
    write: Callable[..., tuple[NestState, jax.Array]]
    # (params, state, chunks, phase) -> (state, logits_BNCV): read, then written; phase counts the chunks so far
    weights: Callable[[tuple], Weights]  # levels -> the weights that read, fastest level first
    boundary: int | None  # the phase to tell `read` at the start of a chunk
    slots: tuple[tuple[int, ...], ...]  # per level its places in the nest's levels; the first holds what reads


def chunked(config: ModelConfig, eta: jax.Array | None = None) -> Chunked:
    """The model of `config` with the levels of `config.fast_chunks` written in context.

    Each row has its own fast weights, which start at the parameters. Without fast levels (or with `cms_eta=0`)
    nothing is ever written, and a chunk is a piece of the stream at whose ends the memories' clocks agree.

    Args:
      config: of the model.
      eta: in the place of `config.cms_eta`, a number that may be traced: one program for many learning rates.

    Raises:
      ValueError: chunk sizes that do not divide, fastest first.

    Example:
      >>> chunked(ModelConfig(cms_chunks=(16, 64))).size, chunked(ModelConfig(chunk_proj=4, chunk_mem=12)).size
      (16, 36)

    Reference: paper (70) to (74); spec 6.2, 6.3, 6.5, 6.6.
    """
    model = skeleton(config)
    return (
        _written(config, model, config.cms_eta if eta is None else eta) if config.adapts else _read_only(config, model)
    )


def _written(config: ModelConfig, model: LM, eta: float | jax.Array) -> Chunked:
    start_weights = fast_weights(config).take
    nested = functools.partial(_nest, config, model, eta)
    nested({})  # refuse bad chunk sizes now, not at the first call

    def init(params: Params, batch_size: int) -> NestState:
        carry = model.init_state(params, batch_size)
        start = jax.vmap(lambda row: nested(params).init(start_weights(params), row))(carry)
        return start._replace(phase=jnp.zeros(batch_size, jnp.int32))

    def read(params: Params, levels: tuple, carry: Any, tokens_BT: jax.Array, mask_BT: jax.Array, phase: int | None):
        def row(levels, carry, tokens_T, mask_T):
            weights = _current(config, levels)
            return _run(config, model, params, weights, carry, tokens_T, mask_T, phase)

        return jax.vmap(row)(levels, carry, tokens_BT, mask_BT)

    def write(params: Params, state: NestState, chunks: Chunks, phase: int | None):
        return jax.vmap(lambda row, xs: nested(params).apply(row, xs, phase))(state, chunks)

    size = config.fast_chunks[0]
    weights = functools.partial(_current, config)
    return Chunked(size, init, read, write, weights, _phase_of_chunks(config, size), _slots(config))


def _read_only(config: ModelConfig, model: LM) -> Chunked:
    clocks = math.lcm(config.chunk_proj, config.chunk_mem)
    size = -(-LEAST_CHUNK // clocks) * clocks
    at_boundary = _phase_of_chunks(config, size)

    def init(params: Params, batch_size: int) -> NestState:
        return NestState((), model.init_state(params, batch_size), jnp.zeros(batch_size, jnp.int32))

    def read(params: Params, levels: tuple, carry: Any, tokens_BT: jax.Array, mask_BT: jax.Array, phase: int | None):
        del levels
        return model.apply(params, carry, tokens_BT, phase=phase, mask_BT=mask_BT)

    def write(params: Params, state: NestState, chunks: Chunks, phase: int | None):
        del phase

        def one(carry, chunk):
            tokens_BC, mask_BC = chunk
            return read(params, (), carry, tokens_BC, mask_BC, at_boundary)

        by_chunk = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), (chunks.tokens_BNC, chunks.mask_BNC))
        carry, logits_NBCV = jax.lax.scan(one, state.carry, by_chunk)
        return state._replace(carry=carry), jnp.swapaxes(logits_NBCV, 0, 1)

    return Chunked(size, init, read, write, lambda levels: (), at_boundary, ())


def _nest(config: ModelConfig, model: LM, eta: float | jax.Array, params: Params) -> Nest:
    """The nest of one row around the model with these parameters; its clock counts the fastest chunks."""
    sizes, size = config.fast_chunks, config.fast_chunks[0]
    truncation = (*config.bptt_chunks, *(None for _ in sizes))
    levels = [
        level(None, optax.sgd(eta / tokens), tokens // size, bptt_chunks=writes)
        for tokens, writes in zip(sizes, truncation, strict=False)
    ]
    phase = _phase_of_chunks(config, size)

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


def _slots(config: ModelConfig) -> tuple[tuple[int, ...], ...]:
    """Nested levels, but the slowest, are followed by their start states."""
    depth = len(config.fast_chunks)
    if config.cms_variant != "nested":
        return tuple((i,) for i in range(depth))
    return tuple((2 * i, 2 * i + 1) if i + 1 < depth else (2 * i,) for i in range(depth))


def _current(config: ModelConfig, levels: tuple[Any, ...]) -> Weights:
    """The weights that read, from the states of the nest's levels; nested levels lie between their start states."""
    return tuple(levels[slot].start for slot, *_ in _slots(config))


def _phase_of_chunks(config: ModelConfig, size: int) -> int | None:
    """What the model is told about its clock at the start of a chunk: 0 if its memories are at a boundary."""
    at_boundary = size % math.lcm(config.chunk_proj, config.chunk_mem) == 0
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


def cut_chunks(tokens_BT: jax.Array, mask_BT: jax.Array, count: int) -> Chunks:
    """Cut `count * C + 1` tokens into chunks with their targets."""

    def cut(x_BT: jax.Array) -> jax.Array:
        return x_BT.reshape(x_BT.shape[0], count, -1)

    taught_BT = mask_BT[:, :-1] & mask_BT[:, 1:]
    return Chunks(cut(tokens_BT[:, :-1]), cut(tokens_BT[:, 1:]), cut(mask_BT[:, :-1]), cut(taught_BT))
