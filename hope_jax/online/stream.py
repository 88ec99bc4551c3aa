"""The pure machine under a session: a stream of tokens, read and written chunk by chunk, for a batch of rows.

One compiled program does any number of chunks: its loop runs as often as there are chunks, over buffers of a fixed
size. So the state after a stream does not depend on how the stream was cut into calls, to the bit.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hope_jax.models import ModelConfig
from hope_jax.models.chunked import Chunked, Chunks, chunked
from hope_jax.online.gates import Gate
from hope_jax.types import LevelState, NestState

TOKENS_A_CALL = 1024

type Array = Any  # a jax.Array under jit, a np.ndarray on the host


class StreamState(NamedTuple):
    """All of a row after whole chunks; every array has the batch axis first."""

    nest: NestState  # levels, and the context (memories, caches, tails) as the carry
    gate: Any


class Held(NamedTuple):
    """Tokens of a stream that are not yet a whole chunk and its next token."""

    tokens: np.ndarray  # [n] int32
    teaches: np.ndarray  # [n] bool, as a target


class Pieces(NamedTuple):
    """Whole chunks of several rows; rows and chunks without anything to read are dead."""

    tokens_BNC: Array  # int32
    target_BNC: Array  # int32, the next tokens
    taught_BNC: Array  # bool, the target may teach
    live_BN: Array  # bool


class ChunkReport(NamedTuple):
    """What one chunk did; L levels."""

    losses: Array  # [..., C] float32, nats of each next token at the weights that read the chunk
    before: Array  # [...] float32, their mean: the chunk's surprise
    after: Array  # [...] float32, the same at the weights it left behind
    wrote: Array  # [...] bool, the gate was open and something taught
    rolled_back: Array  # [...] bool, something was not finite: nothing of the chunk is left, nor of what was pending
    fired: Array  # [..., L] bool, the level's clock was due
    step: Array  # [..., L] float32, norm of the level's change over the norm of its start weights
    gradient: Array  # [..., L] float32, norm of the mean gradient over the level's chunk, of levels that fired;
    # nan where a nested level started again, which leaves nothing of its own step
    moved: Array  # [..., L] float32, distance from the start weights over their norm


class Stream(NamedTuple):
    """Compiled functions; they are shared by all sessions of a model with the same options."""

    size: int  # C, tokens of a chunk
    chunks: int  # N, chunks of a call
    weights: Callable[[tuple], tuple]  # levels -> the weights that read, fastest first
    init: Callable[[Any, int], StreamState]  # (params, batch)
    advance: Callable[[Any, StreamState, Pieces], tuple[StreamState, ChunkReport]]  # reports [B, N, ...]
    step: Callable[..., tuple[Any, jax.Array]]  # (params, levels, carry, token_B) -> (carry, logits_BV); no write
    new_context: Callable[[Any, StreamState, Array], StreamState]  # rows_B forget their context
    forget: Callable[..., StreamState]  # (params, state, rows_B, level) the level starts again


@functools.lru_cache(maxsize=16)
def build_stream(config: ModelConfig, gate: Gate, max_moved: float | None = None, measure_after: bool = True) -> Stream:
    """The functions of a model's streams.

    Args:
      config: of the model; `cms_chunks` (or `mlp_chunks`) are the levels that learn.
      gate: which chunks are written.
      max_moved: how far a level may move from its start weights, over their norm; None: anywhere.
      measure_after: read every written chunk again, for `ChunkReport.after`; else that is `before`.
    """
    model = chunked(config)
    chunks = max(1, TOKENS_A_CALL // model.size)
    one = functools.partial(_one_chunk, config, model, gate, max_moved, measure_after)

    def init(params: Any, batch_size: int) -> StreamState:
        gates = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch_size, *leaf.shape)), gate.init())
        return StreamState(model.init(params, batch_size), gates)

    def advance(params: Any, state: StreamState, pieces: Pieces) -> tuple[StreamState, ChunkReport]:
        by_chunk = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), pieces)
        count = by_chunk.live_BN.any(axis=1).sum()  # live chunks of a row come first
        report = jax.eval_shape(lambda: one(params, state, jax.tree.map(lambda leaf: leaf[0], by_chunk))[1])
        empty = jax.tree.map(lambda leaf: jnp.zeros((chunks, *leaf.shape), leaf.dtype), report)

        def body(i, carried):
            state, reports = carried
            state, new = one(params, state, jax.tree.map(lambda leaf: leaf[i], by_chunk))
            return state, jax.tree.map(lambda all_, leaf: all_.at[i].set(leaf), reports, new)

        state, reports = jax.lax.fori_loop(0, count, body, (state, empty))
        return state, jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), reports)

    def step(params: Any, levels: tuple, carry: Any, token_B: jax.Array) -> tuple[Any, jax.Array]:
        one_token = token_B[:, None]
        carry, logits_B1V = model.read(params, levels, carry, one_token, jnp.ones(one_token.shape, bool), None)
        return carry, logits_B1V[:, 0]

    def new_context(params: Any, state: StreamState, rows_B: jax.Array) -> StreamState:
        fresh = model.init(params, rows_B.shape[0]).carry
        return state._replace(nest=state.nest._replace(carry=choose(rows_B, fresh, state.nest.carry)))

    def forget(params: Any, state: StreamState, rows_B: jax.Array, level: int) -> StreamState:
        fresh = model.init(params, rows_B.shape[0]).levels
        levels = list(state.nest.levels)
        for slot in model.slots[level]:
            levels[slot] = choose(rows_B, fresh[slot], levels[slot])
        return state._replace(nest=state.nest._replace(levels=tuple(levels)))

    return Stream(
        model.size,
        chunks,
        model.weights,
        jax.jit(init, static_argnums=1),
        jax.jit(advance),
        jax.jit(step),
        jax.jit(new_context),
        jax.jit(forget, static_argnums=3),
    )


def cut(held: Held, count: int, size: int, chunks: int) -> Pieces:
    """The first `count` chunks of one row, with room for `chunks`.

    Example:
      >>> tokens = np.arange(5, dtype=np.int32)
      >>> cut(Held(tokens, np.ones(5, bool)), 2, 2, 3).target_BNC.tolist()
      [[[1, 2], [3, 4], [0, 0]]]
    """
    total = count * size

    def by_chunk(leaf: np.ndarray) -> np.ndarray:
        return np.pad(leaf, (0, chunks * size - total)).reshape(1, chunks, size)

    live_BN = np.arange(chunks)[None] < count
    ends = slice(total), slice(1, total + 1)
    tokens, target = (by_chunk(held.tokens[end]) if count else by_chunk(held.tokens[:0]) for end in ends)
    return Pieces(tokens, target, by_chunk(held.teaches[ends[1]] if count else held.teaches[:0]), live_BN)


def _one_chunk(
    config: ModelConfig,
    model: Chunked,
    gate: Gate,
    max_moved: float | None,
    measure_after: bool,
    params: Any,
    old: StreamState,
    piece: Pieces,
) -> tuple[StreamState, ChunkReport]:
    """Read a chunk of every live row, write it if the gate opens, and undo it where it went wrong."""
    tokens_BC, target_BC, taught_BC, live_B = piece
    real_BC = jnp.ones(tokens_BC.shape, bool)

    def losses(logits_BCV: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits_BCV.astype(jnp.float32), target_BC)

    def read(levels: tuple) -> jax.Array:
        return losses(model.read(params, levels, old.nest.carry, tokens_BC, real_BC, model.boundary)[1]).mean(axis=1)

    surprise_B = read(old.nest.levels) if gate.name != "always" else jnp.zeros(live_B.shape)
    gate_state, open_B = jax.vmap(gate.update)(old.gate, surprise_B)
    gate_state = choose(taught_BC.any(axis=1), gate_state, old.gate)  # it does not look at what may not teach
    taught_BC = taught_BC & open_B[:, None]
    chunk = Chunks(*(leaf[:, None] for leaf in (tokens_BC, target_BC, real_BC, taught_BC)))
    nest, logits_BNCV = model.write(params, old.nest, chunk, None)
    losses_BC = losses(logits_BNCV[:, 0])
    before_B = losses_BC.mean(axis=1)
    written = nest.levels
    nest = nest._replace(levels=_clamp(model, params, written, max_moved))
    after_B = read(nest.levels) if measure_after and config.adapts else before_B
    finite_B = _finite((nest, before_B, after_B))
    undone = old._replace(nest=old.nest._replace(levels=_without_pending(old.nest.levels)))
    new = choose(live_B, choose(finite_B, StreamState(nest, gate_state), undone), old)
    report = ChunkReport(
        losses=losses_BC,
        before=before_B,
        after=after_B,
        wrote=taught_BC.any(axis=1) & finite_B,
        rolled_back=~finite_B & live_B,
        **_movement(config, model, params, old.nest, new.nest, written, live_B & finite_B),
    )
    return new, report


def _movement(
    config: ModelConfig,
    model: Chunked,
    params: Any,
    old: NestState,
    new: NestState,
    written: tuple[LevelState, ...],
    ran_B: Array,
) -> dict[str, jax.Array]:
    """The fields of a report that speak of levels, [B, L]."""
    if not config.adapts:
        none_BL = jnp.zeros((ran_B.size, 0))
        return {"fired": none_BL.astype(bool), "step": none_BL, "gradient": none_BL, "moved": none_BL}
    start = model.weights(model.init(params, 1).levels)
    before, after = model.weights(old.levels), model.weights(new.levels)
    norm_BL = _norms(start)
    step_BL = _norms(jax.tree.map(jnp.subtract, after, before))
    unclamped_BL = _norms(jax.tree.map(jnp.subtract, model.weights(written), before))
    every_BL = jnp.array([[chunk // model.size for chunk in config.fast_chunks]])
    fired_BL = (new.phase[:, None] % every_BL == 0) & ran_B[:, None]
    slower_fired_BL = jnp.pad(fired_BL[:, 1:], ((0, 0), (0, 1)))
    again_BL = slower_fired_BL & (config.cms_variant == "nested")
    return {
        "fired": fired_BL,
        "step": step_BL / norm_BL,
        # A step is eta times the mean of the chunk's gradients.
        "gradient": jnp.where(again_BL, jnp.nan, unclamped_BL / config.cms_eta),
        "moved": _norms(jax.tree.map(jnp.subtract, after, start)) / norm_BL,
    }


def _without_pending(levels: tuple[LevelState, ...]) -> tuple[LevelState, ...]:
    """What waits may be what is not finite: kept, it would undo every chunk to come."""
    return tuple(level._replace(pending=jax.tree.map(jnp.zeros_like, level.pending)) for level in levels)


def _clamp(model: Chunked, params: Any, levels: tuple[LevelState, ...], max_moved: float | None) -> tuple:
    """Levels that went too far from their start weights, back to the allowed distance."""
    if max_moved is None or not levels:
        return levels
    clamped = list(levels)
    for slot, *_ in model.slots:
        now = levels[slot].start
        start = model.init(params, 1).levels[slot].start
        moved = jax.tree.map(jnp.subtract, now, start)
        far_B = _norms((moved,))[:, 0] / (max_moved * _norms((start,))[:, 0])
        scale_B = 1 / jnp.maximum(far_B, 1)
        back = jax.tree.map(lambda s, m, scale_B=scale_B: s + m * rows(scale_B, m), start, moved)
        clamped[slot] = levels[slot]._replace(start=choose(far_B > 1, back, now))
    return tuple(clamped)


def _norms(by_level: tuple) -> jax.Array:
    """[B, L] norm of each level's weights."""
    return jnp.stack([jnp.sqrt(sum(_squares(leaf) for leaf in jax.tree.leaves(level))) for level in by_level], axis=1)


def _squares(leaf: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=tuple(range(1, leaf.ndim)))


def _finite(tree: Any) -> jax.Array:
    """[B] whether no number of the row is infinite or not a number."""
    flags = [
        jnp.isfinite(leaf).reshape(leaf.shape[0], -1).all(axis=1)
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return functools.reduce(jnp.logical_and, flags)


def choose(rows_B: Array, new: Any, old: Any) -> Any:
    """`new` in the flagged rows, `old` in the others."""
    return jax.tree.map(lambda a, b: jnp.where(rows(rows_B, b), a, b), new, old)


def rows(flag_B: Array, like: jax.Array) -> jax.Array:
    """[B] with as many axes as `like`."""
    return jnp.expand_dims(flag_B, tuple(range(1, like.ndim)))
