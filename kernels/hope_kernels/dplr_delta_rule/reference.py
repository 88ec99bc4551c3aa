"""The definition: one token after another, everything in the state dtype, differentiated by jax."""

import jax
import jax.numpy as jnp

from hope_kernels.dplr_delta_rule.types import Inputs


def _rows(key_BHK: jax.Array, matrix_BHKV: jax.Array) -> jax.Array:
    """key @ matrix for every head."""
    return jnp.einsum("bhk,bhkv->bhv", key_BHK, matrix_BHKV, precision=jax.lax.Precision.HIGHEST)


def _outer(key_BHK: jax.Array, value_BHV: jax.Array) -> jax.Array:
    return key_BHK[..., :, None] * value_BHV[..., None, :]


def _step(read: str, s: jax.Array, token: Inputs) -> tuple[jax.Array, jax.Array | None]:
    """One token of (P1); the arrays of `token` have no time axis."""
    if token.reset is not None:
        s = jnp.where(token.reset[..., None, None] > 0, 0, s)
    before = s
    s = jnp.exp(token.log_alpha)[..., None] * s - _outer(token.b, _rows(token.c, s)) + _outer(token.k, token.u)
    return s, None if token.q is None else _rows(token.q, before if read == "before" else s)


def forward(inputs: Inputs, state: jax.Array, *, read: str, block_t: int | None) -> tuple[jax.Array | None, jax.Array]:
    """Token loop; there is no tile."""
    del block_t
    tokens_TBH = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0).astype(state.dtype), inputs)
    state, y_TBHV = jax.lax.scan(lambda s, token: _step(read, s, token), state, tokens_TBH)
    return None if y_TBHV is None else jnp.moveaxis(y_TBHV, 0, 1).astype(inputs.k.dtype), state
