"""What goes into an implementation and what comes out."""

from typing import NamedTuple

import jax


class Inputs(NamedTuple):
    """Checked arguments, the same for every implementation.

    Masked tokens arrive here as tokens that do nothing: k = u = b = c = 0, log_alpha = 0.
    """

    q: jax.Array | None  # [B, T, H, K], input dtype; None reads nothing
    k: jax.Array  # [B, T, H, K], input dtype
    u: jax.Array  # [B, T, H, V], input dtype
    b: jax.Array  # [B, T, H, K], input dtype
    c: jax.Array  # [B, T, H, K], input dtype
    log_alpha: jax.Array  # [B, T, H, K], state dtype
    reset: jax.Array | None  # [B, T, H], state dtype, 1 where the state is emptied before the token, else 0


class DPLRDeltaRuleOutput(NamedTuple):
    """What `dplr_delta_rule` returns."""

    y: jax.Array | None  # [B, T, H, V], input dtype; None when q is None
    state: jax.Array  # [B, H, K, V], float32 (float64 for float64 inputs)
