"""The long-term memory module of Titans (arXiv:2501.00663, T-8 to T-18) as a nest of one level."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from hope_jax.chunk_form import FactoredTransformation, gate
from hope_jax.levels import level
from hope_jax.memories import MLPMemory
from hope_jax.nesting import nest
from hope_jax.objectives import l2_regression
from hope_jax.transforms import DGDState, dgd
from hope_jax.types import LevelState, Memory, Nest, Tokens
from hope_kernels import mlp_memory

type Read = Literal["start", "before", "after"]


def titans_lmm(memory: Memory, chunk_size: int, *, momentum: bool = True, read: Read = "start") -> Nest:
    """Gradient descent on L2 with momentum and forgetting, errors at the chunk's start.

        Z_t = mu_t Z_{t-1} - eta_t grad_t        M_t = alpha_t M_{t-1} + Z_t

    Titans writes alpha for what is forgotten; here alpha is RETAINED, one minus it. Titans' theta is eta and its eta
    is mu. The whole chunks of a call with an `mlp_memory` are one call of `hope_kernels.mlp_memory`, whose gradient
    keeps a fraction of the chunk-start weights.

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
    rule = titans_rule(momentum)
    whole = _whole_chunks(memory, chunk_size, momentum, read) if isinstance(memory, MLPMemory) else None
    return nest(level(memory, rule, chunk_size, objective=l2_regression, read=read), whole=whole)


def titans_rule(momentum: bool = True) -> FactoredTransformation:
    """Gradient descent with retention and, by a gate, momentum."""
    return dgd(exact=False, decay=False, momentum="gate" if momentum else None)


def _whole_chunks(memory: MLPMemory, chunk_size: int, momentum: bool, read: Read) -> Callable:
    """The level's whole chunks through `hope_kernels.mlp_memory`; leading axes of the memory are its heads."""

    def whole(state: LevelState, xs: Tokens) -> tuple[LevelState, jax.Array | None]:
        length, *leading = xs.key.shape[:-1]
        given = {n: jnp.moveaxis(g, 0, -1) for n in xs._fields[3:] if (g := getattr(xs, n)) is not None}

        def heads(x: Any) -> Any:  # [T, ..., K] -> [1, T, H, K]
            return None if x is None else x.reshape(1, length, -1, x.shape[-1])

        def per_head(name: str, needed: bool = False) -> Any:  # [T] or [T, ...] -> [1, T, H]
            value = gate(given, name, (*leading, length))
            if value is None and needed:
                plain = name.removeprefix("log_")
                raise ValueError(f"titans_lmm needs the gate {plain}; the Tokens have {sorted(given)}")
            return None if value is None else value.reshape(-1, length).T[None]

        def matrices(tree: Any) -> Any:  # [..., F, K] -> [1, H, F, K]
            return jax.tree.map(lambda w: w.reshape(1, -1, *w.shape[-2:]), tree)

        before: Any = state.rule
        start, z = matrices(state.start), matrices(before.momentum)
        out = mlp_memory(
            heads(xs.query),
            heads(xs.key),
            heads(xs.value),
            per_head("eta", needed=True),
            start["w1"],
            start["w2"],
            chunk_size=chunk_size,
            log_alpha=per_head("log_alpha"),
            log_mu=per_head("log_mu", needed=True) if momentum else None,
            momentum1=z["w1"] if momentum else None,
            momentum2=z["w2"] if momentum else None,
            mask=per_head("mask"),
            decay=False,
            exact=False,
            residual=memory.residual,
            read=read,
        )

        def like(old: Any, w1: Any, w2: Any) -> Any:
            return jax.tree.map(lambda new, w: new.reshape(w.shape).astype(w.dtype), {"w1": w1, "w2": w2}, old)

        end = like(state.start, out.w1, out.w2)
        rule = DGDState(like(before.momentum, out.momentum1, out.momentum2) if momentum else None)
        y = None if out.y is None else out.y.reshape(*xs.key.shape)
        return state._replace(start=end, running=end, rule=rule), y

    return whole
