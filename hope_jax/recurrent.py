"""Recurrent layers that a chunk cannot parallelise: LSTM, and the self-referential weight matrix.

Both are `SequenceLayer`s for one example: one `lax.scan` over the tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.sequence_layer import SequenceLayer, project
from hope_jax.types import Params


class LSTMState(NamedTuple):
    hidden: jax.Array  # [D]
    cell: jax.Array  # [D]


def lstm(dim: int) -> SequenceLayer:
    """Long short-term memory: (i, f, o, g) = r W_x + h W_h + b, c <- s(f) c + s(i) tanh(g), h = s(o) tanh(c).

    s is the logistic function; the forget gate's bias starts at 1.

    Args:
        dim: D, width of input, state and output.

    Example:
        >>> layer = lstm(4)
        >>> params = layer.init(jax.random.key(0))
        >>> layer.apply(params, layer.init_state(params), jnp.ones((3, 4)))[1].shape
        (3, 4)

    Reference: Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000.
    """

    def init(key: jax.Array) -> Params:
        x, h = jax.random.split(key)
        bias = jnp.zeros((4, dim)).at[1].set(1.0)
        return {
            "wx": jax.random.normal(x, (dim, 4 * dim)) / dim**0.5,
            "wh": jax.random.normal(h, (dim, 4 * dim)) / dim**0.5,
            "gates": {"b": bias.reshape(-1)},
        }

    def init_state(params: Params) -> LSTMState:
        zero = jnp.zeros(dim, params["wh"].dtype)
        return LSTMState(zero, zero)

    def step(params: Params, state: LSTMState, from_input: jax.Array) -> tuple[LSTMState, jax.Array]:
        i, f, o, g = jnp.split(from_input + state.hidden @ params["wh"], 4)
        cell = jax.nn.sigmoid(f) * state.cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return LSTMState(hidden, cell), hidden

    def apply(params: Params, state: LSTMState, r_TD: jax.Array, phase: int | None = None, mask_T=None):
        del phase
        inputs_TG = project(r_TD, params["wx"], r_TD.dtype) + params["gates"]["b"][None]
        state, y_TD = _over_tokens(lambda s, x: step(params, s, x), state, inputs_TG, mask_T)
        return state, y_TD.astype(r_TD.dtype)

    return SequenceLayer(init, init_state, apply)


def self_referential(dim: int, heads: int = 1) -> SequenceLayer:
    """The self-referential weight matrix: one matrix makes the output, and the keys and rates that change itself.

        (y_t, q_t, k_t, b_t) = W phi(x_t)        W <- W + s(b_t) (W phi(q_t) - W phi(k_t)) phi(k_t)^T

    with phi = softmax, s the logistic function, and one rate for the rows of each of y, q, k and b. Stored for row
    vectors, [K, 3 K + 4].

    Args:
        dim: D.
        heads: H, each with a matrix of its own over K = D / H channels.

    Example:
        >>> layer = self_referential(8, heads=2)
        >>> params = layer.init(jax.random.key(0))
        >>> layer.apply(params, layer.init_state(params), jnp.ones((3, 8)))[1].shape
        (3, 8)

    Reference: Irie et al., arXiv:2202.05780; paper (58).
    """
    width = dim // heads
    rows = 3 * width + 4
    # Which of the four rates belongs to each row of the matrix.
    owner = np.concatenate([np.repeat(np.arange(3), width), np.full(4, 3)])

    def init(key: jax.Array) -> Params:
        mix, start = jax.random.split(key)
        return {
            "in_proj": jax.random.normal(mix, (dim, dim)) / dim**0.5,
            # softmax keys have a norm of about 1 / sqrt(K), so entries of order one answer with order one
            "start": {"w": jax.random.normal(start, (heads, width, rows))},
        }

    def step(w_HKR: jax.Array, x_HK: jax.Array) -> tuple[jax.Array, jax.Array]:
        def read(x_HK: jax.Array) -> jax.Array:
            return jnp.einsum("HK,HKR->HR", jax.nn.softmax(x_HK), w_HKR)

        made = read(x_HK)
        y, q, k, rate = jnp.split(made, [width, 2 * width, 3 * width], axis=-1)
        change = jax.nn.sigmoid(rate)[:, owner] * (read(q) - read(k))
        return w_HKR + jnp.einsum("HK,HR->HKR", jax.nn.softmax(k), change), y

    def apply(params: Params, state: jax.Array, r_TD: jax.Array, phase: int | None = None, mask_T=None):
        del phase
        x_THK = project(r_TD, params["in_proj"], r_TD.dtype).reshape(-1, heads, width)
        state, y_THK = _over_tokens(step, state, x_THK, mask_T)
        return state, y_THK.reshape(r_TD.shape).astype(r_TD.dtype)

    return SequenceLayer(init, lambda params: params["start"]["w"], apply)


def _over_tokens(step: Any, state: Any, xs: jax.Array, mask_T: jax.Array | None) -> tuple[Any, jax.Array]:
    """Scan a step over the tokens; a masked token leaves the state as it is."""

    def body(state: Any, x: Any) -> tuple[Any, jax.Array]:
        token, keep = x
        new, y = step(state, token)
        if keep is not None:
            new = jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, state)
        return new, y

    return jax.lax.scan(body, state, (xs, mask_T))
