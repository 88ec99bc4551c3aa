"""One tile of one head, (P3)-(P5): q, k, b, c, log_alpha [C, K], u [C, V], reset [C], the state [K, V].

State, decays, the triangular system and E are in the state dtype (float32, or float64); products with q, k, u, b and c
take the input dtype and accumulate in the state dtype.
"""

from functools import partial

import jax
import jax.numpy as jnp

from hope_kernels.delta_rule.tile import dot
from hope_kernels.delta_rule.triangular import unit_lower_solve
from hope_kernels.dplr_delta_rule.decay import faded
from hope_kernels.dplr_delta_rule.types import Inputs


def tile(read: str, inputs: Inputs, s_KV: jax.Array) -> tuple[jax.Array | None, jax.Array]:
    """Reads [C, V] (None without q) and the state after the tile; `read` is "before" or "after"."""
    q, k, u, b, c, log_alpha, reset = inputs
    product = partial(dot, dtype=k.dtype, accumulate=s_KV.dtype)
    start_C1, token_CC = _reach(reset, k.shape[0])
    # Who reads, and whether before the token's own write: c always does. It is then a reader one token earlier, and its
    # scores are moved down again; the row that `roll` brings round to the end drops out there.
    readers = [(c, True)] if q is None else [(c, True), (q, read == "before")]
    ahead_RCK = jnp.stack([jnp.roll(x, -1, axis=0) if early else x for x, early in readers])
    writers_WCK = jnp.stack([b, k])
    scores_RWCC, since_start_CK, until_end_CK = faded(ahead_RCK, writers_WCK, log_alpha)

    def seen(n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What reader n has of the state at the start [C, V], of the erasures and of the writes [C, C]."""
        (reader_CK, early), scores_WCC, log_CK = readers[n], scores_RWCC[n], since_start_CK
        if early:
            scores_WCC, log_CK = _row_down(scores_WCC, axis=1), _row_down(log_CK, axis=0)
        from_start_CV = product("tk,kv->tv", reader_CK.astype(s_KV.dtype) * jnp.exp(log_CK), s_KV)
        return jnp.where(start_C1, from_start_CV, 0), *jnp.where(token_CC[None], scores_WCC, 0)

    recalled_CV, erased_CC, written_CC = seen(0)
    e_CV = unit_lower_solve(erased_CC, -(recalled_CV + product("ti,iv->tv", written_CC, u)))

    left_WCK = jnp.where(token_CC[None, -1, :, None], writers_WCK.astype(s_KV.dtype) * jnp.exp(until_end_CK)[None], 0)
    end_KV = jnp.where(start_C1[-1:], jnp.exp(since_start_CK[-1])[:, None] * s_KV, 0)
    end_KV += product("ik,iv->kv", left_WCK[0], e_CV) + product("ik,iv->kv", left_WCK[1], u)
    if q is None:
        return None, end_KV
    y_CV, erased_CC, written_CC = seen(1)
    y_CV += product("ti,iv->tv", erased_CC, e_CV) + product("ti,iv->tv", written_CC, u)
    return y_CV.astype(k.dtype), end_KV


def _reach(reset_C: jax.Array | None, size: int) -> tuple[jax.Array, jax.Array]:
    """Whether token t can know of the state at the start [C, 1], and of token i <= t [C, C]: a reset ends both."""
    lower_CC = jnp.tril(jnp.ones((size, size), bool))
    if reset_C is None:
        return jnp.ones((size, 1), bool), lower_CC
    document_C = jnp.cumsum(jax.lax.stop_gradient(reset_C))
    return (document_C == 0)[:, None], lower_CC & (document_C[:, None] == document_C[None, :])


def _row_down(x: jax.Array, axis: int) -> jax.Array:
    """Row t - 1 in the place of row t, zeros in the first."""
    moved = jax.lax.slice_in_dim(x, 0, x.shape[axis] - 1, axis=axis)
    return jnp.pad(moved, [(int(n == axis), 0) for n in range(x.ndim)])
