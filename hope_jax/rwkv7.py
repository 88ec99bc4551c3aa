"""RWKV-7's time mixing: a matrix memory with a decay per key channel and an erasure of its own direction."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hope_jax.sequence_layer import SequenceLayer, project
from hope_jax.types import Params
from hope_kernels import dplr_delta_rule

_SHIFTED = ("r", "k", "v", "decay", "rate", "gate")


class RWKV7State(NamedTuple):
    memory: jax.Array  # [H, K, K]
    last: jax.Array  # [D] the input before this call


def rwkv7(dim: int, heads: int, rank: int | None = None) -> SequenceLayer:
    """The time-mixing layer of RWKV-7, from normalised input to gated reads; the map out is the caller's.

        S_t = (diag(w_t) - (a_t * kappa_t)^T kappa_t) S_{t-1} + k~_t^T v_t
        y_t = (norm(r_t S_t) + (r_t . (rho * k~_t)) v_t) * g_t

    with kappa the unit-norm removal key, k~ = k * (1 + (a - 1) alpha) the replacement key, the decay
    w = exp(-exp(-1/2) sigmoid(d)), and a, d and g from two small matrices each. Every projection reads its own mixture
    of a token with the one before it. The value residual from the first layer, which crosses layers, is left out.

    Args:
        dim: D.
        heads: H; K = D / H.
        rank: width between the two small matrices; None is D / 16, at least 8.

    Example:
        >>> layer = rwkv7(8, 2)
        >>> params = layer.init(jax.random.key(0))
        >>> layer.apply(params, layer.init_state(params), jnp.ones((3, 8)))[1].shape
        (3, 8)

    Reference: arXiv:2503.14456, section 4.
    """
    width, rank = dim // heads, rank or max(dim // 16, 8)

    def init_state(params: Params) -> RWKV7State:
        dtype = params["wk"].dtype
        return RWKV7State(jnp.zeros((heads, width, width), dtype), jnp.zeros(dim, dtype))

    def split(x_TD: jax.Array) -> jax.Array:  # [T, D] -> [T, H, K]
        return x_TD.reshape(-1, heads, width)

    def apply(params: Params, state: RWKV7State, r_TD: jax.Array, phase: int | None = None, mask_T=None):
        del phase
        x_TD = r_TD.astype(state.last.dtype)
        if mask_T is not None:
            x_TD = jnp.where(mask_T[:, None], x_TD, 0)
        before_TD = jnp.concatenate([state.last[None], x_TD[:-1]])
        mixed = {n: x_TD + (before_TD - x_TD) * params["shift"][f"{n}_scale"][None] for n in _SHIFTED}

        def small(name: str, between) -> jax.Array:
            p = params[name]
            return between(mixed[name] @ p["w1"]) @ p["w2"] + p["bias"][None]

        def scaled(x_TD: jax.Array, name: str) -> jax.Array:
            return x_TD * params[name]["scale"][None]

        read, key, value = (project(mixed[n], params[f"w{n}"], r_TD.dtype) for n in ("r", "k", "v"))
        rate = jax.nn.sigmoid(small("rate", lambda x: x))
        log_alpha = -jnp.exp(-0.5) * jax.nn.sigmoid(small("decay", jnp.tanh))
        kappa = _unit(split(scaled(key, "removal")))
        key = key * (1 + scaled(rate - 1, "replacement"))
        read, key, value, rate, log_alpha = map(split, (read, key, value, rate, log_alpha))
        arrays: dict[str, Any] = {"q": read, "k": key, "u": value, "b": rate * kappa, "c": kappa}
        out: Any = dplr_delta_rule(
            **{name: x[None].astype(r_TD.dtype) for name, x in arrays.items()},
            log_alpha=log_alpha[None],
            initial_state=state.memory[None],
            mask=None if mask_T is None else jnp.broadcast_to(mask_T[None, :, None], (1, *read.shape[:2])),
        )
        p = params["norm"]
        normed = _standard(out.y[0].astype(x_TD.dtype)).reshape(x_TD.shape) * p["scale"][None] + p["bias"][None]
        bonus = jnp.sum(read * split(scaled(key.reshape(x_TD.shape), "bonus")), axis=-1, keepdims=True) * value
        y_TD = (normed + bonus.reshape(x_TD.shape)) * small("gate", jax.nn.sigmoid)
        last = jnp.concatenate([state.last[None], x_TD])[-1]
        return RWKV7State(out.state[0], last), y_TD.astype(r_TD.dtype)

    return SequenceLayer(lambda key: _init(key, dim, rank), init_state, apply)


def _init(key: jax.Array, dim: int, rank: int) -> Params:
    """Outer parameters; the decays of the channels are spread over short and long memories."""
    keys = iter(jax.random.split(key, 10))
    normal = lambda shape, scale: scale * jax.random.normal(next(keys), shape)  # noqa: E731

    def small(bias: jax.Array) -> Params:
        return {"w1": normal((dim, rank), dim**-0.5), "w2": normal((rank, dim), 0.1 * rank**-0.5), "bias": bias}

    return {
        **{f"w{name}": normal((dim, dim), dim**-0.5) for name in ("r", "k", "v")},
        "shift": {f"{name}_scale": jnp.full(dim, 0.5) for name in _SHIFTED},
        "decay": small(jnp.linspace(-6.0, -1.0, dim)),
        "rate": small(jnp.zeros(dim)),
        "gate": small(jnp.zeros(dim)),
        "removal": {"scale": jnp.full(dim, 0.85)},
        "replacement": {"scale": jnp.ones(dim)},
        "bonus": {"scale": jnp.zeros(dim)},
        "norm": {"scale": jnp.ones(dim), "bias": jnp.zeros(dim)},
    }


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def _standard(x: jax.Array, epsilon: float = 64e-5) -> jax.Array:
    """Zero mean and unit variance over each head; epsilon as published."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
