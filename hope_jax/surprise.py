"""Surprise gates: a token is written as far as its error exceeds what is usual (spec 7.8, 11.1).

What is usual is an average over earlier chunks, so that within a chunk it stands still, like the weights, and a stream
may be cut anywhere. It is a constant of the outer gradient.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

DECAY = 0.9  # of the average over chunks
TINY = 1e-12


class Surprise(NamedTuple):
    """What a stream has been surprised by so far, per head."""

    average_H: jax.Array  # over earlier chunks; 0 before the end of the first, which is written whole
    total_H: jax.Array  # of the chunk that is being read
    real: jax.Array  # [] int32: its tokens that are no padding
    place: jax.Array  # [] int32: its tokens, padding included
    tokens: jax.Array  # [] int32: of the stream that are no padding
    written_H: jax.Array  # the mean gate of those, which is the fraction that was written


def init_surprise(heads: int) -> Surprise:
    """Before a stream."""
    count, none_H = jnp.zeros((), jnp.int32), jnp.zeros(heads)
    return Surprise(none_H, none_H, count, count, count, none_H)


def gate_by_surprise(
    state: Surprise, error_HCK: jax.Array, mask_C: jax.Array | None, size: int, threshold: float, temperature: float
) -> tuple[Surprise, jax.Array]:
    """How far each token is written.

    Args:
        state: before these tokens, of which at most `size` end a chunk.
        error_HCK: errors of a memory.
        mask_C: False for padding, which surprises nobody.
        size: tokens of a chunk.
        threshold: kappa, in averages.
        temperature: 0 writes a token or not; else its gate is sigmoid((s / average - threshold) / temperature).

    Returns:
        The state after them, and gates in [0, 1], [H, C].

    Example:
        >>> errors = jnp.array([[[3.0], [1.0]]])
        >>> state, first = gate_by_surprise(init_surprise(1), errors, None, 2, 1.0, 0.0)
        >>> state, gates = gate_by_surprise(state, errors, None, 2, 1.0, 0.0)  # the average is 2
        >>> first.tolist(), gates.tolist(), state.written_H.tolist()
        ([[1.0, 1.0]], [[1.0, 0.0]], [0.75])

    Reference: spec 7.8.
    """
    real_C = jnp.ones(error_HCK.shape[1], bool) if mask_C is None else mask_C
    s_HC = jnp.sqrt(jnp.sum(error_HCK**2, axis=-1) + TINY)
    if temperature:
        over_HC = s_HC / jnp.maximum(state.average_H, TINY)[:, None] - threshold
        gate_HC = jax.nn.sigmoid(over_HC / temperature)
    else:
        gate_HC = (s_HC >= threshold * state.average_H[:, None]).astype(s_HC.dtype)
    constant_HC, opened_HC = jax.lax.stop_gradient((s_HC, gate_HC))
    more = jnp.sum(real_C, dtype=jnp.int32)
    total_H = state.total_H + jnp.sum(jnp.where(real_C, constant_HC, 0), axis=-1)
    real, tokens = state.real + more, state.tokens + more
    opened_H = jnp.sum(jnp.where(real_C, opened_HC, 0), axis=-1)
    mean_H = total_H / jnp.maximum(real, 1)
    usual_H = jnp.where(state.average_H > 0, DECAY * state.average_H + (1 - DECAY) * mean_H, mean_H)
    place = (state.place + real_C.size) % size
    ends = place == 0
    after = Surprise(
        jnp.where(ends & (real > 0), usual_H, state.average_H),
        jnp.where(ends, 0, total_H),
        jnp.where(ends, 0, real),
        place,
        tokens,
        state.written_H + (opened_H - more * state.written_H) / jnp.maximum(tokens, 1),
    )
    return after, gate_HC


def gated(gates: dict[str, Any], gate_HC: jax.Array, *, retention: bool) -> dict[str, Any]:
    """eta times the gate; with `retention` alpha becomes 1 - gate (1 - alpha), so that a shut gate forgets nothing."""
    gates = gates | {"eta": gates["eta"] * gate_HC}
    if retention and "log_alpha" in gates:
        whole = gate_HC == 1  # keeps alpha to the bit; log1p would have no finite gradient there for small ones
        part = jnp.log1p(jnp.where(whole, 0.0, gate_HC) * jnp.expm1(gates["log_alpha"]))
        gates["log_alpha"] = jnp.where(whole, gates["log_alpha"], part)
    return gates
