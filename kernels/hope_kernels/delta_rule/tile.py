"""One tile of one head, (S5.2)-(S5.6): q, k [C, K], u [C, V], gates [C], states [K, V].

The state, the triangular system, W and every decay ratio are in the state dtype (float32, or float64); products
with q, k and u take the input dtype and accumulate in the state dtype.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hope_kernels.delta_rule.triangular import unit_lower_solve
from hope_kernels.delta_rule.types import Inputs, State


def tile(read: str, inputs: Inputs, state: State) -> tuple[jax.Array | None, State]:
    """Reads [C, V] (None without q) and the state after the tile; `read` is "before" or "after"."""
    if inputs.log_mu is None or state.z is None:
        return _plain(read, inputs, state.s)
    return _with_momentum(read, inputs, state.s, state.z)


def dot(subscripts: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype, accumulate: jnp.dtype) -> jax.Array:
    """einsum in `dtype`, accumulated in `accumulate`; full precision unless `dtype` has 16 bits."""
    precision = jax.lax.Precision.DEFAULT if jnp.finfo(dtype).bits == 16 else jax.lax.Precision.HIGHEST
    return jnp.einsum(
        subscripts, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=accumulate
    )


class _Decay(NamedTuple):
    """Products of a decay factor over stretches of the tile."""

    since_start_C: jax.Array  # over tokens 1..t
    between_CC: jax.Array  # over tokens i+1..t at (t, i), zero above the diagonal


def _decay(log_C: jax.Array | None, size: int, dtype: jnp.dtype) -> _Decay:
    lower = jnp.tril(jnp.ones((size, size), bool))
    if log_C is None:
        return _Decay(jnp.ones((size,), dtype), lower.astype(dtype))
    total_C = jnp.cumsum(log_C)
    # The upper half is masked before exp as well: it would overflow there and poison the gradients.
    difference_CC = jnp.where(lower, total_C[:, None] - total_C[None, :], 0)
    return _Decay(jnp.exp(total_C), jnp.where(lower, jnp.exp(difference_CC), 0))


def _previous(x: jax.Array, first: float) -> jax.Array:
    """Rows of token t-1 in the place of token t; the first row is `first` everywhere."""
    return jnp.concatenate([jnp.full_like(x[:1], first), x[:-1]])


def _plain(read: str, inputs: Inputs, s_KV: jax.Array) -> tuple[jax.Array | None, State]:
    """(S5.2), (S5.3)."""
    q, k, u, eta, log_alpha, _, _ = inputs
    dtype, wide = k.dtype, s_KV.dtype
    gamma_C, ratio_CC = _decay(log_alpha, k.shape[0], wide)

    w_CV = u.astype(wide)
    if eta is not None:
        key_products_CC = dot("tk,ik->ti", k, k, dtype, wide)
        recalled_CV = _previous(gamma_C, 1.0)[:, None] * dot("tk,kv->tv", k, s_KV, dtype, wide)
        system_CC = eta[:, None] * _previous(ratio_CC, 0.0) * key_products_CC
        w_CV = unit_lower_solve(system_CC, w_CV - eta[:, None] * recalled_CV)

    end_KV = gamma_C[-1] * s_KV + dot("tk,tv->kv", k, ratio_CC[-1][:, None] * w_CV, dtype, wide)
    if q is None:
        return None, State(end_KV, None)
    if read == "before":
        gamma_C, ratio_CC = _previous(gamma_C, 1.0), _previous(ratio_CC, 0.0)
    y_CV = gamma_C[:, None] * dot("tk,kv->tv", q, s_KV, dtype, wide)
    y_CV += dot("ti,iv->tv", ratio_CC * dot("tk,ik->ti", q, k, dtype, wide), w_CV, dtype, wide)
    return y_CV.astype(dtype), State(end_KV, None)


def _with_momentum(read: str, inputs: Inputs, s_KV: jax.Array, z_KV: jax.Array) -> tuple[jax.Array | None, State]:
    """(S5.4)-(S5.6); P = R diag(mask) Omega, because Z is not added to S at a masked token."""
    q, k, u, eta, log_alpha, log_mu, mask = inputs
    dtype, wide, exact = k.dtype, s_KV.dtype, jax.lax.Precision.HIGHEST
    gamma_C, ratio_CC = _decay(log_alpha, k.shape[0], wide)
    m_C, omega_CC = _decay(log_mu, k.shape[0], wide)
    adds_CC = ratio_CC if mask is None else ratio_CC * jax.lax.stop_gradient(mask)[None, :]
    p_CC = jnp.matmul(adds_CC, omega_CC, precision=exact)
    h_C = jnp.matmul(adds_CC, m_C, precision=exact)

    # What reaches S: the momentum's share of every write, and the erasures W.
    written_CV = p_CC[-1][:, None] * u.astype(wide)
    w_CV = None
    if eta is not None:
        key_products_CC = dot("tk,ik->ti", k, k, dtype, wide)
        recalled_CV = _previous(gamma_C, 1.0)[:, None] * dot("tk,kv->tv", k, s_KV, dtype, wide)
        recalled_CV += _previous(h_C, 0.0)[:, None] * dot("tk,kv->tv", k, z_KV, dtype, wide)
        recalled_CV += dot("ti,iv->tv", _previous(p_CC, 0.0) * key_products_CC, u, dtype, wide)
        system_CC = eta[:, None] * _previous(ratio_CC, 0.0) * key_products_CC
        w_CV = unit_lower_solve(system_CC, -eta[:, None] * recalled_CV)
        written_CV += ratio_CC[-1][:, None] * w_CV

    end_KV = gamma_C[-1] * s_KV + h_C[-1] * z_KV + dot("tk,tv->kv", k, written_CV, dtype, wide)
    end_z_KV = m_C[-1] * z_KV + dot("tk,tv->kv", k, omega_CC[-1][:, None] * u.astype(wide), dtype, wide)
    if q is None:
        return None, State(end_KV, end_z_KV)
    if read == "before":
        gamma_C, ratio_CC = _previous(gamma_C, 1.0), _previous(ratio_CC, 0.0)
        h_C, p_CC = _previous(h_C, 0.0), _previous(p_CC, 0.0)
    scores_CC = dot("tk,ik->ti", q, k, dtype, wide)
    y_CV = gamma_C[:, None] * dot("tk,kv->tv", q, s_KV, dtype, wide)
    y_CV += h_C[:, None] * dot("tk,kv->tv", q, z_KV, dtype, wide)
    y_CV += dot("ti,iv->tv", p_CC * scores_CC, u, dtype, wide)
    if w_CV is not None:
        y_CV += dot("ti,iv->tv", ratio_CC * scores_CC, w_CV, dtype, wide)
    return y_CV.astype(dtype), State(end_KV, end_z_KV)
