"""The chunked form: tiles of `block_t` tokens, one unit-lower-triangular solve per tile (S5.2)-(S5.6).

Functions on one tile of one head are written without batch axes and mapped; names carry the shapes. The state, the
triangular system, W and every decay ratio are in the state dtype (float32, or float64); products with q, k and u take
the input dtype and accumulate in the state dtype.
"""

import jax
import jax.numpy as jnp

from hope_kernels.delta_rule.triangular import unit_lower_solve
from hope_kernels.delta_rule.types import Inputs, State


def _dot(subscripts: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype, accumulate: jnp.dtype) -> jax.Array:
    """einsum in `dtype`, accumulated in `accumulate`; full precision unless the inputs are 16-bit."""
    precision = jax.lax.Precision.DEFAULT if jnp.finfo(dtype).bits == 16 else jax.lax.Precision.HIGHEST
    return jnp.einsum(
        subscripts, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=accumulate
    )


def _shift_down(x: jax.Array, first: float) -> jax.Array:
    """Rows moved down by one; the new first row is `first` everywhere."""
    return jnp.concatenate([jnp.full_like(x[:1], first), x[:-1]])


def _decay(log_C: jax.Array | None, size: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Products of decays: from the start of the tile to each token [C], and between tokens [C, C]."""
    lower = jnp.tril(jnp.ones((size, size), bool))
    if log_C is None:
        return jnp.ones((size,), dtype), lower.astype(dtype)
    total_C = jnp.cumsum(log_C)
    # The upper half is masked before exp as well: it would overflow there and poison the gradients.
    between_CC = jnp.where(lower, total_C[:, None] - total_C[None, :], 0)
    return jnp.exp(total_C), jnp.where(lower, jnp.exp(between_CC), 0)


def tile(read: str, inputs: Inputs, state: State) -> tuple[jax.Array | None, State]:
    """One tile of one head: q, k [C, K], u [C, V], gates [C], states [K, V]."""
    q, k, u, eta, log_alpha, log_mu, mask = inputs
    s0, z0 = state
    size, dtype, accumulate = k.shape[0], k.dtype, s0.dtype

    def dot(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return _dot(subscripts, a, b, dtype, accumulate)

    gamma_C, ratio_CC = _decay(log_alpha, size, accumulate)
    gamma_before_C, ratio_before_CC = _shift_down(gamma_C, 1.0), _shift_down(ratio_CC, 0.0)
    wide_u = u.astype(accumulate)
    products_CC = dot("tk,ik->ti", k, k) if eta is not None else None

    if z0 is None:
        w_CV, from_z = wide_u, None
    else:
        m_C, omega_CC = _decay(log_mu, size, accumulate)
        used_CC = omega_CC if mask is None else mask[:, None] * omega_CC
        used_C = m_C if mask is None else mask * m_C
        exact = jax.lax.Precision.HIGHEST
        p_CC = jnp.matmul(ratio_CC, used_CC, precision=exact)
        h_C = jnp.matmul(ratio_CC, used_C, precision=exact)
        from_z = (m_C, omega_CC, p_CC, h_C)
        w_CV = None

    if eta is not None:
        system_CC = eta[:, None] * ratio_before_CC * products_CC
        pulled_CV = gamma_before_C[:, None] * dot("tk,kv->tv", k, s0)
        if from_z is None:
            right_CV = wide_u - eta[:, None] * pulled_CV
        else:
            _, _, p_CC, h_C = from_z
            pulled_CV += _shift_down(h_C, 0.0)[:, None] * dot("tk,kv->tv", k, z0)
            pulled_CV += dot("ti,iv->tv", _shift_down(p_CC, 0.0) * products_CC, u)
            right_CV = -eta[:, None] * pulled_CV
        w_CV = unit_lower_solve(system_CC, right_CV)

    if from_z is None:
        z1 = None
        s1 = gamma_C[-1] * s0 + dot("tk,tv->kv", k, ratio_CC[-1][:, None] * w_CV)
    else:
        m_C, omega_CC, p_CC, h_C = from_z
        z1 = m_C[-1] * z0 + dot("tk,tv->kv", k, omega_CC[-1][:, None] * wide_u)
        written_CV = p_CC[-1][:, None] * wide_u
        if w_CV is not None:
            written_CV += ratio_CC[-1][:, None] * w_CV
        s1 = gamma_C[-1] * s0 + h_C[-1] * z0 + dot("tk,tv->kv", k, written_CV)

    if q is None:
        return None, State(s1, z1)
    here = (lambda x, first: x) if read == "after" else _shift_down
    scores_CC = dot("tk,ik->ti", q, k)
    y = here(gamma_C, 1.0)[:, None] * dot("tk,kv->tv", q, s0)
    if w_CV is not None:
        y += dot("ti,iv->tv", here(ratio_CC, 0.0) * scores_CC, w_CV)
    if from_z is not None:
        _, _, p_CC, h_C = from_z
        y += here(h_C, 0.0)[:, None] * dot("tk,kv->tv", q, z0)
        y += dot("ti,iv->tv", here(p_CC, 0.0) * scores_CC, u)
    return y.astype(dtype), State(s1, z1)


def tile_over_heads(read: str, inputs: Inputs, state: State) -> tuple[jax.Array | None, State]:
    """`tile` for arrays [B, H, C, ...] and states [B, H, K, V]."""
    return jax.vmap(jax.vmap(lambda i, s: tile(read, i, s)))(inputs, state)


def split(x: jax.Array, block_t: int) -> jax.Array:
    """[B, T, H, ...] -> [N, B, H, C, ...], zeros after the last token."""
    x = jnp.moveaxis(x, 1, 2)
    batch, heads, tokens = x.shape[:3]
    tiles = -(-tokens // block_t)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, tiles * block_t - tokens)] + [(0, 0)] * (x.ndim - 3))
    return jnp.moveaxis(x.reshape(batch, heads, tiles, block_t, *x.shape[3:]), 2, 0)


def join(x: jax.Array, tokens: int) -> jax.Array:
    """The inverse of `split`: [N, B, H, C, ...] -> [B, T, H, ...]."""
    x = jnp.moveaxis(x, 0, 2)
    batch, heads, tiles, block_t = x.shape[:4]
    x = x.reshape(batch, heads, tiles * block_t, *x.shape[4:])[:, :, :tokens]
    return jnp.moveaxis(x, 2, 1)


def tiles_of(inputs: Inputs, block_t: int) -> Inputs:
    """Inputs [B, T, H, ...] as tiles [N, B, H, C, ...]; tokens added at the end do nothing (all zero, masked)."""
    if inputs.log_mu is not None and inputs.mask is None and inputs.k.shape[1] % block_t:
        inputs = inputs._replace(mask=jnp.ones_like(inputs.log_mu))
    return jax.tree.map(lambda x: split(x, block_t), inputs)


def forward_tiles(read: str, tiles: Inputs, state: State) -> tuple[jax.Array | None, State, State]:
    """All tiles in order; returns reads [N, B, H, C, V], the final state and the state at the start of each tile."""

    def step(carry: State, inputs: Inputs):
        y, end = tile_over_heads(read, inputs, carry)
        return end, (y, carry)

    state, (y, starts) = jax.lax.scan(step, state, tiles)
    return y, state, starts
