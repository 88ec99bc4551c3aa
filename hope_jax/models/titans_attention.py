"""Titans with attention: the memory as a context, as a gate beside, and as a layer before sliding-window attention.

MAG and MAL take the layer of `titans`; MAC has a level of its own, with the same rule and gates. Persistent memory is a
set of learned vectors that every token attends to.

Reference: Titans, arXiv:2501.00663, T-21 to T-31; spec 7.8.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hope_jax.gates import titans_gates
from hope_jax.levels import level
from hope_jax.local import heads_first
from hope_jax.memories import mlp_memory
from hope_jax.nesting import nest
from hope_jax.objectives import l2_regression
from hope_jax.sequence_layer import SequenceLayer, l2_normalize, project
from hope_jax.titans import titans_rule
from hope_jax.types import Nest, NestState, Params, Write
from hope_jax.writing import factored_errors

from .mixer import Mixer
from .norm import RMSNorm
from .params import matmul, matrix
from .rotary import rotate
from .window_attention import WindowAttention


class GatedByMemory(nnx.Module):
    """MAG: `(silu(norm(attention(r))) * norm(memory(r))) @ w_out`, both branches over the same input (T-26 to T-28)."""

    def __init__(
        self, attention: WindowAttention, layer: SequenceLayer, *, dim: int, heads: int, out_gain: float, rngs: nnx.Rngs
    ):
        self.attention = attention
        self.recall = Mixer(layer, dim=dim, heads=heads, gated=False, out_gain=1.0, rngs=rngs)
        self.attention_norm, self.recall_norm = RMSNorm(dim), RMSNorm(dim)
        self.w_out = matrix(rngs, dim, dim, out_gain)

    def init_state(self, batch_size: int) -> Any:
        """Of the attention and of the memory."""
        return self.attention.init_state(batch_size), self.recall.init_state(batch_size)

    def __call__(
        self, r_BTD: jax.Array, state: Any, *, phase: int | None, mask_BT: jax.Array | None
    ) -> tuple[Any, jax.Array]:
        window, y_BTD = self.attention(r_BTD, state[0], phase=phase, mask_BT=mask_BT)
        memory, m_BTD = self.recall(r_BTD, state[1], phase=phase, mask_BT=mask_BT)
        o_BTD = jax.nn.silu(self.attention_norm(y_BTD)) * self.recall_norm(m_BTD)
        return (window, memory), matmul(o_BTD, self.w_out)


class MemoryThenAttention(nnx.Module):
    """MAL: sliding-window attention over the memory's normalised output (T-29 to T-31)."""

    def __init__(self, attention: WindowAttention, layer: SequenceLayer, *, dim: int, heads: int, rngs: nnx.Rngs):
        self.recall = Mixer(layer, dim=dim, heads=heads, gated=False, out_gain=1.0, rngs=rngs)
        self.norm = RMSNorm(dim)
        self.attention = attention

    def init_state(self, batch_size: int) -> Any:
        """Of the memory and of the attention."""
        return self.recall.init_state(batch_size), self.attention.init_state(batch_size)

    def __call__(
        self, r_BTD: jax.Array, state: Any, *, phase: int | None, mask_BT: jax.Array | None
    ) -> tuple[Any, jax.Array]:
        memory, m_BTD = self.recall(r_BTD, state[0], phase=phase, mask_BT=mask_BT)
        window, y_BTD = self.attention(self.norm(m_BTD), state[1], phase=phase, mask_BT=mask_BT)
        return (memory, window), y_BTD


class Segment(NamedTuple):
    """What the open segment can attend to; C slots, of which those up to the current token count."""

    recall: tuple[jax.Array, jax.Array]  # [C, H, K] keys, turned by their slot, and values of what the memory answered
    inputs: tuple[jax.Array, jax.Array]  # [C, H, K] of the tokens themselves
    valid_C: jax.Array  # [C] bool, False at padding
    filled: jax.Array  # [] int32


def memory_as_context(
    dim: int, heads: int, *, hidden: int, segment: int, persistent: int, eta_init: float, theta: float | None = 10_000.0
) -> SequenceLayer:
    """MAC: attention inside a segment over [persistent; what the memory recalls; the segment], then a write.

        h_j = M_start(q(r_j))    y_t = Attn([P; h_1..h_t; r_1..r_t])    M learns y_t    o_t = y_t * M_t(q(y_t))

    The answers h are those of the memory at the segment's start; token t sees h_j for j <= t only, and o_t is read from
    the running memory, because reading after the whole segment would show a token its future (spec 7.8). Here the
    memory has plain projections, without the convolution and the SiLU of `memory_layer`: attention mixes the tokens.

    Args:
        dim, heads: D, H of both the attention and the memories.
        hidden: F of the memories.
        segment: tokens of a segment, also the memory's chunk size.
        persistent: number of vectors P.
        eta_init: inner step size at the start.
        theta: base of the rotary wavelengths inside a segment; None for no positions.

    Example:
        >>> layer = memory_as_context(8, 2, hidden=4, segment=4, persistent=2, eta_init=0.1)
        >>> params = layer.init(jax.random.key(0))
        >>> layer.apply(params, layer.init_state(params), jnp.ones((6, 8)))[1].shape
        (6, 8)

    Reference: Titans T-21 to T-25.
    """
    width = dim // heads
    memory = mlp_memory(width, hidden, residual=False)
    gates = titans_gates(eta_init)

    def init(key: jax.Array) -> Params:
        start, gate, persist, *rest = jax.random.split(key, 9)
        names = ("wq", "wk", "wv", "memory_q", "memory_k", "memory_v")
        params: Params = {n: jax.random.normal(k, (dim, dim)) / dim**0.5 for n, k in zip(names, rest, strict=True)}
        params["persistent"] = jax.random.normal(persist, (persistent, dim))
        params["gates"] = gates.init(gate, dim, heads)
        params["start"] = {"level_0": jax.vmap(memory.init)(jax.random.split(start, heads))}
        return params

    def nest_of(params: Params, dtype: Any) -> Nest:
        def made(x_CD: jax.Array, name: str) -> jax.Array:  # [C, D] -> [C, H, K]
            return project(x_CD, params[name], dtype).reshape(-1, heads, width)

        def error(starts: tuple[Params, ...], carry: Segment, piece: dict):
            (start,), r_CD, mask_C = starts, piece["r"], piece["mask"]
            h_HCK = memory.apply(start, heads_first(l2_normalize(made(r_CD, "memory_q"))))
            at_C = carry.filled + jnp.arange(r_CD.shape[0], dtype=jnp.int32)
            seen = carry._replace(
                valid_C=_put(carry.valid_C, mask_C, carry.filled), filled=carry.filled + r_CD.shape[0]
            )
            for name, x_CD in (("recall", jnp.moveaxis(h_HCK, 1, 0).reshape(r_CD.shape)), ("inputs", r_CD)):
                new = (_turn(made(x_CD, "wk"), at_C, theta), made(x_CD, "wv"))
                old = getattr(seen, name)
                seen = seen._replace(**{name: tuple(_put(o, n, carry.filled) for o, n in zip(old, new, strict=True))})
            always = (made(params["persistent"], "wk"), made(params["persistent"], "wv"))
            y_CD = _attend(made(r_CD, "wq"), at_C, seen, always, theta).reshape(r_CD.shape)
            query, key = (heads_first(l2_normalize(made(y_CD, n))) for n in ("memory_q", "memory_k"))
            _, errors = factored_errors(memory, l2_regression, start, key, heads_first(made(y_CD, "memory_v")))
            rates = {name: g.T for name, g in gates.apply(params["gates"], r_CD).items()}
            return (Write(errors, rates, query, mask_C),), seen._replace(filled=seen.filled % segment), y_CD

        def output(y_CD: jax.Array, reads: tuple) -> jax.Array:
            return y_CD * jnp.moveaxis(reads[0], -2, 0).reshape(y_CD.shape)

        lev = level(memory, titans_rule(), segment, objective=l2_regression, read="after")
        return nest(lev, error=error, output=output)

    def init_state(params: Params) -> NestState:
        empty = jnp.zeros((segment, heads, width), params["wq"].dtype)
        nothing = Segment((empty, empty), (empty, empty), jnp.zeros(segment, bool), jnp.zeros((), jnp.int32))
        return nest_of(params, empty.dtype).init((params["start"]["level_0"],), nothing)

    def apply(params: Params, state: NestState, r_TD: jax.Array, phase: int | None = None, mask_T=None):
        mask_T = jnp.ones(r_TD.shape[0], bool) if mask_T is None else mask_T
        xs = {"r": r_TD.astype(params["wq"].dtype), "mask": mask_T}
        state, o_TD = nest_of(params, r_TD.dtype).apply(state, xs, phase)
        return state, o_TD.astype(r_TD.dtype)

    return SequenceLayer(init, init_state, apply)


def _attend(
    q_CHK: jax.Array, at_C: jax.Array, seen: Segment, always: tuple[jax.Array, jax.Array], theta: float | None
) -> jax.Array:
    """Of the tokens in slots `at_C`, to the slots up to their own and to the persistent vectors."""
    slot_S = jnp.arange(seen.valid_C.shape[0], dtype=jnp.int32)
    allowed_CS = (slot_S[None, :] <= at_C[:, None]) & seen.valid_C[None, :]
    turned_CHK = _turn(q_CHK, at_C, theta)
    parts = [jnp.einsum("CHK,SHK->HCS", turned_CHK, keys) for keys, _ in (seen.recall, seen.inputs)]
    parts = [jnp.where(allowed_CS[None], score, jnp.finfo(score.dtype).min) for score in parts]
    parts.append(jnp.einsum("CHK,SHK->HCS", q_CHK, always[0]))
    weights = jax.nn.softmax(jnp.concatenate(parts, axis=-1) * q_CHK.shape[-1] ** -0.5)
    values = jnp.concatenate([seen.recall[1], seen.inputs[1], always[1]])
    return jnp.einsum("HCS,SHK->CHK", weights, values)


def _turn(x_CHK: jax.Array, at_C: jax.Array, theta: float | None) -> jax.Array:
    return rotate(x_CHK[None], at_C[None], theta)[0]


def _put(old: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """`new` in the slots from `at` on."""
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, axis=0)
