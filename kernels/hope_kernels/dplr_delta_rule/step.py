"""Decoding: one token of the recurrence, by its definition."""

from typing import Literal

import jax

from hope_kernels.dplr_delta_rule.api import dplr_delta_rule
from hope_kernels.dplr_delta_rule.types import DPLRDeltaRuleOutput


def dplr_delta_rule_step(
    q: jax.Array | None,
    k: jax.Array,
    u: jax.Array,
    b: jax.Array,
    c: jax.Array,
    log_alpha: jax.Array,
    *,
    state: jax.Array,
    read: Literal["before", "after"] = "after",
    scale: float = 1.0,
) -> DPLRDeltaRuleOutput:
    """The next token: `dplr_delta_rule` with T = 1, without the time axis.

    Args:
        q, k, b, c, log_alpha: [B, H, K].
        u: [B, H, V].
        state: [B, H, K, V], as the token before left it.
        read, scale: as in `dplr_delta_rule`.

    Returns:
        DPLRDeltaRuleOutput(y, state): y [B, H, V].

    Raises:
        ValueError, TypeError: as `dplr_delta_rule`.

    Example:
        >>> import jax.numpy as jnp
        >>> k, u, state = jnp.eye(3)[:1, None], jnp.ones((1, 1, 2)), jnp.full((1, 1, 3, 2), 7.0)
        >>> dplr_delta_rule_step(k, k, u, k, k, jnp.zeros_like(k), state=state).y.tolist()
        [[[1.0, 1.0]]]

    Reference: (P1) of this folder's README.
    """
    out = dplr_delta_rule(
        None if q is None else q[:, None],
        *(x[:, None] for x in (k, u, b, c, log_alpha)),
        initial_state=state,
        read=read,
        scale=scale,
        implementation="reference",
    )
    return out._replace(y=None if out.y is None else out.y[:, 0])
