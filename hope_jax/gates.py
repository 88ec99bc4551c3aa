"""Gates of a memory layer: numbers per token and head, made from the layer's input.

A `Gates` makes every gate of a layer at once, under the names that `Tokens` gives them: eta, the inner learning rate;
alpha, the RETAINED fraction, as its logarithm; mu, the momentum decay, likewise.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hope_jax.types import Params


class Gates(NamedTuple):
    """How a layer makes its gates."""

    init: Callable[[jax.Array, int, int], Params]  # (rng key, D, H) -> outer parameters
    apply: Callable[[Params, jax.Array], dict[str, jax.Array]]  # (params, r[T, D]) -> name: [T, H] float32


def no_gates() -> Gates:
    """For rules that need none."""
    return Gates(lambda key, dim, heads: {}, lambda params, r_TD: {})


class ReadOut(NamedTuple):
    """One gate, squash(r @ w + bias)."""

    squash: Callable[[jax.Array], jax.Array]
    bias: float


def step_size(start: float, most: float | None = None) -> ReadOut:
    """eta: softplus, or `most` times a sigmoid, that begins at `start` (S7.3)."""
    if most is None:
        return ReadOut(jax.nn.softplus, math.log(math.expm1(start)))
    return ReadOut(lambda x: most * jax.nn.sigmoid(x), _logit(start / most))


def retained(start: float) -> ReadOut:
    """log alpha or log mu: a log-sigmoid that begins at log(start) (S7.3)."""
    return ReadOut(jax.nn.log_sigmoid, _logit(start))


def read_outs(**gates: ReadOut) -> Gates:
    """A linear read-out of the input for each gate.

    Args:
        **gates: by name, for example `eta=step_size(0.5, most=1.0), log_alpha=retained(0.99)`.

    Example:
        >>> made = read_outs(eta=step_size(0.25, most=1.0))
        >>> params = made.init(jax.random.key(0), 8, 2)
        >>> made.apply(params, jnp.zeros((3, 8)))["eta"].shape
        (3, 2)

    Reference: spec S7.3, with the input in the place of a memory's output.
    """

    def init(key: jax.Array, dim: int, heads: int) -> Params:
        keys = jax.random.split(key, len(gates))
        return {
            name: {"w": 0.02 * jax.random.normal(k, (dim, heads)), "b": jnp.full(heads, gate.bias)}
            for k, (name, gate) in zip(keys, gates.items(), strict=True)
        }

    def apply(params: Params, r_TD: jax.Array) -> dict[str, jax.Array]:
        return {name: gate.squash(_linear(params[name], r_TD)) for name, gate in gates.items()}

    return Gates(init, apply)


def titans_gates(eta_init: float) -> Gates:
    """Of Titans' memory: step (its theta), retained fraction (one minus its alpha), decay of the surprise (its eta)."""
    return read_outs(eta=step_size(eta_init), log_alpha=retained(0.99), log_mu=retained(0.5))


def fixed_decay(heads: int) -> Gates:
    """RetNet's constant decays, alpha = 1 - 2^(-5 - h) for head h, and the step eta = 1. Nothing is learned.

    Reference: arXiv:2307.08621.
    """

    def apply(params: Params, r_TD: jax.Array) -> dict[str, jax.Array]:
        del params
        log_alpha_H = jnp.log1p(-(2.0 ** (-5 - jnp.arange(heads, dtype=jnp.float32))))
        shape = (r_TD.shape[0], heads)
        return {"eta": jnp.ones(shape), "log_alpha": jnp.broadcast_to(log_alpha_H, shape)}

    return Gates(lambda key, dim, heads: {}, apply)


def discretised(shortest: float = 1e-3, longest: float = 0.1) -> Gates:
    """Mamba-2's: a step eta = softplus(r @ w + b) that also decays, log alpha = -exp(a) eta.

    Args:
        shortest, longest: the steps at the start are spread between these, evenly in their logarithm.

    Reference: arXiv:2405.21060; its `dt` is eta, its `A` is -exp(a), with exp(a) in [1, 16] at the start.
    """

    def init(key: jax.Array, dim: int, heads: int) -> Params:
        w, b, a = jax.random.split(key, 3)
        steps = jnp.exp(jax.random.uniform(b, (heads,), minval=math.log(shortest), maxval=math.log(longest)))
        bias = steps + jnp.log(-jnp.expm1(-steps))  # the inverse of softplus
        rate = jnp.log(jax.random.uniform(a, (heads,), minval=1.0, maxval=16.0))
        return {"eta": {"w": 0.02 * jax.random.normal(w, (dim, heads)), "b": bias}, "rate": {"b": rate}}

    def apply(params: Params, r_TD: jax.Array) -> dict[str, jax.Array]:
        eta_TH = jax.nn.softplus(_linear(params["eta"], r_TD))
        return {"eta": eta_TH, "log_alpha": -jnp.exp(params["rate"]["b"])[None] * eta_TH}

    return Gates(init, apply)


def _linear(params: Params, r_TD: jax.Array) -> jax.Array:
    """In float32 whatever the input: decays close to one need its digits."""
    return r_TD.astype(params["w"].dtype) @ params["w"] + params["b"][None]


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
