"""What goes into an implementation of the MLP memory and what comes out.

Shape letters: B batch, T time, C tokens in a chunk, N chunks, H heads, K key and value width, F hidden
width.
"""

from typing import Any, Literal, NamedTuple

import jax


class Weights(NamedTuple):
    """A two-layer memory per head."""

    w1: Any  # [B, H, F, K]  hidden to output
    w2: Any  # [B, H, K, F]  input to hidden


class State(NamedTuple):
    """The memories and their momenta, in the state dtype."""

    weights: Weights
    momentum: Weights | None  # None without momentum


class Inputs(NamedTuple):
    """Checked arguments, the same for every implementation. None means the term is absent.

    Masked tokens arrive here as tokens that do nothing (k = v = 0, eta = 0, log_alpha = log_mu = 0); `mask` itself
    is kept only for the momentum form, where an ordinary token adds its momentum to the weights.
    """

    q: jax.Array | None  # [B, T, H, K]
    k: jax.Array  # [B, T, H, K]
    v: jax.Array  # [B, T, H, K]
    eta: jax.Array  # [B, T, H], state dtype
    log_alpha: jax.Array | None  # [B, T, H], state dtype
    log_mu: jax.Array | None  # [B, T, H], state dtype
    mask: jax.Array | None  # [B, T, H], state dtype, 1 or 0; only with log_mu


class Options(NamedTuple):
    """What is fixed when a program is traced: the memory, its objective, how it is written and read."""

    rule: Literal["input", "layerwise"] = "input"  # whose keys set the steps, and which matrices forget along them
    decay: bool = True  # delta gradient descent; False: plain gradient descent with the same steps
    exact: bool = True  # eta / (1 + eta ||key||^2) in the place of eta
    objective: Literal["l2", "dot_product"] = "l2"
    error_clip: float | None = None  # the error's norm is cut to this: Huber's loss of ||y - v||
    residual: bool = True  # y = x + ..., or without the `x +`
    read: Literal["start", "before", "after"] = "start"


class MLPMemoryOutput(NamedTuple):
    """What `mlp_memory` returns."""

    y: jax.Array | None  # [B, T, H, K], input dtype; None when q is None
    w1: jax.Array  # [B, H, F, K], float32 (float64 for float64 inputs)
    w2: jax.Array  # [B, H, K, F], like w1
    momentum1: jax.Array | None  # like w1; None when log_mu is None
    momentum2: jax.Array | None  # like w2; None when log_mu is None
