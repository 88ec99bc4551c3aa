"""Oja's rule (66) as a nest: a delta rule on the transposed state, with values in the place of keys."""

from typing import Any

import jax
import jax.numpy as jnp

from hope_jax.chunk_form import Recurrence, gate, run
from hope_jax.levels import level
from hope_jax.local import heads_first, local_output, local_write
from hope_jax.memories import linear_memory
from hope_jax.nesting import nest
from hope_jax.transforms import dgd
from hope_jax.types import LevelState, Nest, Outer, Params, Tokens


def oja(key_width: int, value_width: int) -> Nest:
    """Oja's rule, S_t = S_{t-1} (alpha_t I - eta_t v_t v_t^T) + eta_t k_t v_t^T, y_t = q_t S_t. Gates: eta, alpha.

    Gradient descent with retention on -<k S, v> + 1/2 ||S v||^2, whose error is (S v - k) v^T, written token by token.
    It contracts along the values, so they should have unit length, or eta ||v||^2 stay below 2.

    A whole call needs no token loop. The transposed state is a delta rule with the key v and the value k, and what it
    writes, w_t = eta_t (k_t - S_{t-1} v_t), makes S itself a gated linear attention, S_t = alpha_t S_{t-1} + w_t v_t^T.

    Args:
        key_width, value_width: K and V.

    Returns:
        A nest over `Tokens`.

    Example:
        >>> import jax.numpy as jnp
        >>> from hope_jax import Tokens
        >>> n, x, half = oja(1, 1), jnp.ones((3, 1)), jnp.full(3, 0.5)
        >>> n.apply(n.init(({"w": jnp.zeros((1, 1))},)), Tokens(x, 2 * x, x, eta=half / 2))[1][:, 0].tolist()
        [0.5, 0.5, 0.5]

    Reference: paper (66); spec 2.2, 2.5.
    """
    rule = dgd(exact=False, decay=False)
    lev = level(linear_memory(key_width, value_width), rule, 1, read="after")
    return nest(lev, error=oja_error, output=local_output, whole=_whole)


def oja_error(params_by_level: tuple[Params, ...], carry: Any, chunk: Tokens):
    """The error of Oja's objective for matrices {"w": [..., K, V]}: an `Outer` with the value as its delta."""
    key, value = heads_first(chunk.key), heads_first(chunk.value)
    errors = ({"w": Outer(delta=value, key=value @ params["w"].mT - key)} for params in params_by_level)
    return tuple(local_write(error, chunk) for error in errors), carry, (None,) * len(params_by_level)


def _whole(state: LevelState, xs: Tokens) -> tuple[LevelState, jax.Array | None]:
    write, start = local_write(None, xs), state.start["w"]
    key, value = heads_first(xs.key), heads_first(xs.value)
    eta, log_alpha = (gate(write.gates, name, key.shape[:-1]) for name in ("eta", "log_alpha"))
    if eta is None:
        raise ValueError(f"oja needs the gate eta; the Tokens have {sorted(write.gates)}")

    def step(pull: jax.Array) -> jax.Array:
        return (eta[..., None] * pull).astype(key.dtype)

    transposed = Recurrence(value, step(key), eta, log_alpha, None)
    kept: Any = run(transposed, start.mT, None, value, "before", write.mask).y  # S_{t-1} v_t
    written = Recurrence(step(key - kept), value, None, log_alpha, None)
    out = run(written, start, None, write.query, "after", write.mask)
    end = {"w": out.state.astype(start.dtype)}
    return state._replace(start=end, running=end), None if out.y is None else jnp.moveaxis(out.y, -2, 0)
