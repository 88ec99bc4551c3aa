"""Decoding: one token of the recurrence, by its definition."""

from typing import Literal

import jax

from hope_kernels.delta_rule.api import delta_rule
from hope_kernels.delta_rule.types import DeltaRuleOutput


def delta_rule_step(
    q: jax.Array | None,
    k: jax.Array,
    u: jax.Array,
    eta: jax.Array | None = None,
    *,
    state: jax.Array,
    momentum: jax.Array | None = None,
    log_alpha: jax.Array | None = None,
    log_mu: jax.Array | None = None,
    read: Literal["before", "after"] = "after",
    scale: float = 1.0,
) -> DeltaRuleOutput:
    """The next token: `delta_rule` with T = 1, without the time axis.

    The cost is that of reading and writing the state once; nothing is padded to a tile.

    Args:
        q, k: [B, Hk, K].
        u: [B, H, V].
        eta, log_alpha, log_mu: [B, H].
        state: [B, H, K, V], as the token before left it; likewise `momentum`, with `log_mu`.
        read, scale: as in `delta_rule`.

    Returns:
        DeltaRuleOutput(y, state, momentum): y [B, H, V].

    Raises:
        ValueError, TypeError: as `delta_rule`.

    Example:
        >>> import jax.numpy as jnp
        >>> k, u = jnp.eye(3)[:1, None], jnp.ones((1, 1, 2))
        >>> delta_rule_step(k, k, u, jnp.ones((1, 1)), state=jnp.full((1, 1, 3, 2), 7.0)).y.tolist()
        [[[1.0, 1.0]]]

    Reference: spec (S2.1), (S5.1).
    """

    def token(x: jax.Array | None):
        return None if x is None else x[:, None]

    out = delta_rule(
        token(q),
        k[:, None],
        u[:, None],
        token(eta),
        log_alpha=token(log_alpha),
        log_mu=token(log_mu),
        initial_state=state,
        initial_momentum=momentum,
        read=read,
        scale=scale,
        implementation="reference",
    )
    return out._replace(y=None if out.y is None else out.y[:, 0])
