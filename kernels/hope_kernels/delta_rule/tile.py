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


class _Reach(NamedTuple):
    """What a token can know of: the state that comes in, and which earlier tokens. A reset ends both."""

    start_C: jax.Array  # bool, no reset up to and with token t
    token_CC: jax.Array  # bool, i <= t and no reset after i up to and with t


def _reach(reset_C: jax.Array | None, size: int) -> _Reach:
    lower_CC = jnp.tril(jnp.ones((size, size), bool))
    if reset_C is None:
        return _Reach(jnp.ones((size,), bool), lower_CC)
    document_C = jnp.cumsum(jax.lax.stop_gradient(reset_C))
    return _Reach(document_C == 0, lower_CC & (document_C[:, None] == document_C[None, :]))


class _Decay(NamedTuple):
    """Products of a decay factor over stretches of the tile; zero where there is no reach."""

    since_start_C: jax.Array  # over tokens 1..t
    between_CC: jax.Array  # over tokens i+1..t at (t, i)


def _decay(log_C: jax.Array | None, reach: _Reach, dtype: jnp.dtype) -> _Decay:
    if log_C is None:
        return _Decay(reach.start_C.astype(dtype), reach.token_CC.astype(dtype))
    total_C = jnp.cumsum(log_C)
    # What is out of reach is masked before exp as well: it would overflow there and poison the gradients.
    difference_CC = jnp.where(reach.token_CC, total_C[:, None] - total_C[None, :], 0)
    since_start_C = jnp.where(reach.start_C, jnp.exp(total_C), 0)
    return _Decay(since_start_C, jnp.where(reach.token_CC, jnp.exp(difference_CC), 0))


def _before(x: jax.Array, first: float, reach: _Reach) -> jax.Array:
    """A decay just before token t instead of just after it: the row of t-1, `first` at the start of the tile."""
    x = jnp.concatenate([jnp.full_like(x[:1], first), x[:-1]])
    return jnp.where(reach.start_C if x.ndim == 1 else reach.token_CC, x, 0)


def _plain(read: str, inputs: Inputs, s_KV: jax.Array) -> tuple[jax.Array | None, State]:
    """(S5.2), (S5.3)."""
    q, k, u, eta, log_alpha, _, _, reset = inputs
    dtype, wide = k.dtype, s_KV.dtype
    reach = _reach(reset, k.shape[0])
    gamma_C, ratio_CC = _decay(log_alpha, reach, wide)

    w_CV = u.astype(wide)
    if eta is not None:
        key_products_CC = dot("tk,ik->ti", k, k, dtype, wide)
        recalled_CV = _before(gamma_C, 1.0, reach)[:, None] * dot("tk,kv->tv", k, s_KV, dtype, wide)
        system_CC = eta[:, None] * _before(ratio_CC, 0.0, reach) * key_products_CC
        w_CV = unit_lower_solve(system_CC, w_CV - eta[:, None] * recalled_CV)

    end_KV = gamma_C[-1] * s_KV + dot("tk,tv->kv", k, ratio_CC[-1][:, None] * w_CV, dtype, wide)
    if q is None:
        return None, State(end_KV, None)
    if read == "before":
        gamma_C, ratio_CC = _before(gamma_C, 1.0, reach), _before(ratio_CC, 0.0, reach)
    y_CV = gamma_C[:, None] * dot("tk,kv->tv", q, s_KV, dtype, wide)
    y_CV += dot("ti,iv->tv", ratio_CC * dot("tk,ik->ti", q, k, dtype, wide), w_CV, dtype, wide)
    return y_CV.astype(dtype), State(end_KV, None)


def _with_momentum(read: str, inputs: Inputs, s_KV: jax.Array, z_KV: jax.Array) -> tuple[jax.Array | None, State]:
    """(S5.4)-(S5.6); P = R diag(mask) Omega, because Z is not added to S at a masked token."""
    q, k, u, eta, log_alpha, log_mu, mask, reset = inputs
    dtype, wide, exact = k.dtype, s_KV.dtype, jax.lax.Precision.HIGHEST
    reach = _reach(reset, k.shape[0])
    gamma_C, ratio_CC = _decay(log_alpha, reach, wide)
    m_C, omega_CC = _decay(log_mu, reach, wide)
    adds_CC = ratio_CC if mask is None else ratio_CC * jax.lax.stop_gradient(mask)[None, :]
    p_CC = jnp.matmul(adds_CC, omega_CC, precision=exact)
    h_C = jnp.matmul(adds_CC, m_C, precision=exact)

    # What reaches S: the momentum's share of every write, and the erasures W.
    written_CV = p_CC[-1][:, None] * u.astype(wide)
    w_CV = None
    if eta is not None:
        key_products_CC = dot("tk,ik->ti", k, k, dtype, wide)
        recalled_CV = _before(gamma_C, 1.0, reach)[:, None] * dot("tk,kv->tv", k, s_KV, dtype, wide)
        recalled_CV += _before(h_C, 0.0, reach)[:, None] * dot("tk,kv->tv", k, z_KV, dtype, wide)
        recalled_CV += dot("ti,iv->tv", _before(p_CC, 0.0, reach) * key_products_CC, u, dtype, wide)
        system_CC = eta[:, None] * _before(ratio_CC, 0.0, reach) * key_products_CC
        w_CV = unit_lower_solve(system_CC, -eta[:, None] * recalled_CV)
        written_CV += ratio_CC[-1][:, None] * w_CV

    end_KV = gamma_C[-1] * s_KV + h_C[-1] * z_KV + dot("tk,tv->kv", k, written_CV, dtype, wide)
    end_z_KV = m_C[-1] * z_KV + dot("tk,tv->kv", k, omega_CC[-1][:, None] * u.astype(wide), dtype, wide)
    if q is None:
        return None, State(end_KV, end_z_KV)
    if read == "before":
        gamma_C, ratio_CC = _before(gamma_C, 1.0, reach), _before(ratio_CC, 0.0, reach)
        h_C, p_CC = _before(h_C, 0.0, reach), _before(p_CC, 0.0, reach)
    scores_CC = dot("tk,ik->ti", q, k, dtype, wide)
    y_CV = gamma_C[:, None] * dot("tk,kv->tv", q, s_KV, dtype, wide)
    y_CV += h_C[:, None] * dot("tk,kv->tv", q, z_KV, dtype, wide)
    y_CV += dot("ti,iv->tv", p_CC * scores_CC, u, dtype, wide)
    if w_CV is not None:
        y_CV += dot("ti,iv->tv", ratio_CC * scores_CC, w_CV, dtype, wide)
    return y_CV.astype(dtype), State(end_KV, end_z_KV)
