"""Titans with attention: the memory as a context, as a gate beside, and as a layer before sliding-window attention.

The memory is `titans_lmm` throughout. Persistent memory is a set of learned vectors that every token attends to.

Reference: Titans, arXiv:2501.00663, T-21 to T-31; spec 7.8.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hope_jax.gates import read_outs, retained, step_size
from hope_jax.levels import level
from hope_jax.local import heads_first
from hope_jax.memories import mlp_memory
from hope_jax.nesting import nest
from hope_jax.objectives import l2_regression
from hope_jax.sequence_layer import SequenceLayer, l2_normalize
from hope_jax.transforms import dgd
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
    """The open segment of a memory-as-context layer; C slots, of which those up to the current token count."""

    input_CD: jax.Array  # [C, D]
    recall_CD: jax.Array  # [C, D] what the memory answered
    valid_C: jax.Array  # [C] bool, False at padding
    filled: jax.Array  # [] int32


def memory_as_context(
    dim: int, heads: int, *, hidden: int, segment: int, persistent: int, eta_init: float, theta: float | None = 10_000.0
) -> SequenceLayer:
    """MAC: attention inside a segment over [persistent; what the memory recalls; the segment], then a write.

        h_j = M_start(q(r_j))    y_t = Attn([P; h_1..h_t; r_1..r_t])    M learns y_t    o_t = y_t * M_t(q(y_t))

    The answers h are those of the memory at the segment's start; token t sees h_j for j <= t only, and o_t is read from
    the running memory, because reading after the whole segment would show a token its future (spec 7.8).

    Args:
        dim, heads: D, H of both the attention and the memories.
        hidden: F of the memories.
        segment: tokens of a segment, also the memory's chunk size.
        persistent: number of vectors P.
        eta_init: inner step size at the start.
        theta: base of the rotary wavelengths.

    Example:
        >>> layer = memory_as_context(8, 2, hidden=4, segment=4, persistent=2, eta_init=0.1)
        >>> params = layer.init(jax.random.key(0))
        >>> layer.apply(params, layer.init_state(params), jnp.ones((6, 8)))[1].shape
        (6, 8)

    Reference: Titans T-21 to T-25.
    """
    width = dim // heads
    memory = mlp_memory(width, hidden, residual=False)
    rule = dgd(exact=False, decay=False, momentum="gate")
    gates = read_outs(eta=step_size(eta_init), log_alpha=retained(0.99), log_mu=retained(0.5))

    def init(key: jax.Array) -> Params:
        start, gate, persist, *rest = jax.random.split(key, 9)
        names = ("wq", "wk", "wv", "memory_q", "memory_k", "memory_v")
        params: Params = {n: jax.random.normal(k, (dim, dim)) / dim**0.5 for n, k in zip(names, rest, strict=True)}
        params["persistent"] = jax.random.normal(persist, (persistent, dim))
        params["gates"] = gates.init(gate, dim, heads)
        params["start"] = jax.vmap(memory.init)(jax.random.split(start, heads))
        return params

    def split(x_CD: jax.Array) -> jax.Array:  # [C, D] -> [C, H, K]
        return x_CD.reshape(-1, heads, width)

    def attend(params: Params, r_CD: jax.Array, seen: Segment) -> jax.Array:
        """Of the newest tokens, to the persistent vectors and the slots up to their own."""
        count = r_CD.shape[0]
        slot_S = jnp.arange(segment, dtype=jnp.int32)
        at_C = seen.filled - count + jnp.arange(count, dtype=jnp.int32)
        plain_CHK = split(r_CD @ params["wq"])
        q_CHK = rotate(plain_CHK[None], at_C[None], theta)[0]

        def keys(x_SD: jax.Array) -> jax.Array:
            return rotate(split(x_SD @ params["wk"])[None], slot_S[None], theta)[0]

        allowed_CS = (slot_S[None, :] <= at_C[:, None]) & seen.valid_C[None, :]
        parts = [jnp.einsum("CHK,SHK->HCS", q_CHK, keys(x)) for x in (seen.recall_CD, seen.input_CD)]
        parts = [jnp.where(allowed_CS[None], score, jnp.finfo(score.dtype).min) for score in parts]
        parts.append(jnp.einsum("CHK,SHK->HCS", plain_CHK, split(params["persistent"] @ params["wk"])))
        weights = jax.nn.softmax(jnp.concatenate(parts, axis=-1) * width**-0.5)
        values = jnp.concatenate([seen.recall_CD, seen.input_CD, params["persistent"]]) @ params["wv"]
        return jnp.einsum("HCS,SHK->CHK", weights, split(values)).reshape(count, dim)

    def mac(params: Params) -> Nest:
        def error(starts: tuple[Params, ...], carry: Segment, piece: dict):
            (start,) = starts
            r_CD, mask_C = piece["r"], piece["mask"]
            h_HCK = memory.apply(start, heads_first(l2_normalize(split(r_CD @ params["memory_q"]))))
            seen = _append(carry, r_CD, jnp.moveaxis(h_HCK, 1, 0).reshape(r_CD.shape), mask_C)
            y_CD = attend(params, r_CD, seen)
            query, key = (heads_first(l2_normalize(split(y_CD @ params[n]))) for n in ("memory_q", "memory_k"))
            value = heads_first(split(y_CD @ params["memory_v"]))
            _, errors = factored_errors(memory, l2_regression, start, key, value)
            made = {name: g.T for name, g in gates.apply(params["gates"], r_CD).items()}
            carry = seen._replace(filled=seen.filled % segment)
            return (Write(errors, made, query, mask_C),), carry, y_CD

        def output(y_CD: jax.Array, reads: tuple) -> jax.Array:
            return y_CD * jnp.moveaxis(reads[0], -2, 0).reshape(y_CD.shape)

        lev = level(memory, rule, segment, objective=l2_regression, read="after")
        return nest(lev, error=error, output=output)

    def init_state(params: Params) -> NestState:
        empty = jnp.zeros((segment, dim), params["wq"].dtype)
        carry = Segment(empty, empty, jnp.zeros(segment, bool), jnp.zeros((), jnp.int32))
        return mac(params).init((params["start"],), carry)

    def apply(params: Params, state: NestState, r_TD: jax.Array, phase: int | None = None, mask_T=None):
        mask_T = jnp.ones(r_TD.shape[0], bool) if mask_T is None else mask_T
        state, o_TD = mac(params).apply(state, {"r": r_TD.astype(params["wq"].dtype), "mask": mask_T}, phase)
        return state, o_TD.astype(r_TD.dtype)

    return SequenceLayer(init, init_state, apply)


def _append(carry: Segment, r_CD: jax.Array, h_CD: jax.Array, mask_C: jax.Array) -> Segment:
    """The segment with these tokens in its next slots."""

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        at = (carry.filled, *[jnp.zeros((), jnp.int32)] * (old.ndim - 1))
        return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)

    return Segment(
        put(carry.input_CD, r_CD),
        put(carry.recall_CD, h_CD),
        put(carry.valid_C, mask_C),
        carry.filled + r_CD.shape[0],
    )
