"""The long-term memory module of Titans (arXiv:2501.00663, T-8 to T-18) as a nest of one level."""

from typing import Literal

from hope_jax.levels import level
from hope_jax.nesting import nest
from hope_jax.objectives import l2_regression
from hope_jax.transforms import dgd
from hope_jax.types import Memory, Nest


def titans_lmm(
    memory: Memory, chunk_size: int, *, momentum: bool = True, read: Literal["start", "before", "after"] = "start"
) -> Nest:
    """Gradient descent on L2 with momentum and forgetting, errors at the chunk's start.

        Z_t = mu_t Z_{t-1} - eta_t grad_t        M_t = alpha_t M_{t-1} + Z_t

    Titans writes alpha for what is forgotten; here alpha is RETAINED, one minus it. Titans' theta is eta and its eta
    is mu.

    Args:
        memory: a matrix or an MLP, `linear_memory`, `mlp_memory` or `deep_memory`.
        chunk_size: C, tokens per gradient point.
        momentum: False drops Z (T-16).
        read: as in `level`.

    Returns:
        A nest over `Tokens` with gates eta, alpha and, with momentum, mu.

    Example:
        >>> import jax.numpy as jnp
        >>> from hope_jax import Tokens, linear_memory
        >>> import jax
        >>> n, x, g = titans_lmm(linear_memory(4, 4), 2), jnp.ones((6, 4)), jnp.full((6,), 0.5)
        >>> state, y = n.apply(n.init(n.params(jax.random.key(0))), Tokens(x, x, x, eta=g, alpha=g, mu=g))
        >>> y.shape
        (6, 4)

    Reference: Titans T-8 to T-18; spec 7.8.
    """
    rule = dgd(exact=False, decay=False, momentum="gate" if momentum else None)
    return nest(level(memory, rule, chunk_size, objective=l2_regression, read=read))
