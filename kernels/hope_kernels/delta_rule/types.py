"""What goes into an implementation of the delta rule and what comes out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Inputs(NamedTuple):
    """Checked arguments, the same for every implementation. None means the term is absent.

    Masked tokens arrive here as tokens that do nothing (k = u = 0, eta = 0, log_alpha = log_mu = 0); `mask`
    itself is kept only for the momentum form, where an ordinary token adds Z to S and a masked one does not.
    Hk key heads serve H value heads: value head h is addressed by key head h // (H / Hk).
    """

    q: jax.Array | None  # [B, T, Hk, K], input dtype
    k: jax.Array  # [B, T, Hk, K], input dtype
    u: jax.Array  # [B, T, H, V], input dtype
    eta: jax.Array | None  # [B, T, H], state dtype
    log_alpha: jax.Array | None  # [B, T, H], state dtype
    log_mu: jax.Array | None  # [B, T, H], state dtype
    mask: jax.Array | None  # [B, T, H], state dtype, 1 or 0; only with log_mu
    reset: jax.Array | None  # [B, T], state dtype, 1 where state and momentum are emptied before the token, else 0


class State(NamedTuple):
    """The memory and its momentum, both in the state dtype."""

    s: jax.Array  # [B, H, K, V]
    z: jax.Array | None  # [B, H, K, V]; None without momentum


class DeltaRuleOutput(NamedTuple):
    """What `delta_rule` returns."""

    y: jax.Array | None  # [B, T, H, V], input dtype; None when q is None
    state: jax.Array  # [B, H, K, V], float32 (float64 for float64 inputs)
    momentum: jax.Array | None  # [B, H, K, V], like state; None when log_mu is None


def value_heads_per_key_head(inputs: Inputs) -> int:
    """H / Hk."""
    return inputs.u.shape[2] // inputs.k.shape[2]


def state_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Float64 for float64 inputs, float32 for every other."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
