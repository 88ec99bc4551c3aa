"""The definition: one token after another, everything in the state dtype, differentiated by jax."""

import jax
import jax.numpy as jnp

from hope_kernels.delta_rule.config import Config
from hope_kernels.delta_rule.types import Inputs, State, value_heads_per_key_head

_EXACT = jax.lax.Precision.HIGHEST


def _rows(key_BHK: jax.Array, matrix_BHKV: jax.Array) -> jax.Array:
    """key @ matrix for every head."""
    return jnp.einsum("bhk,bhkv->bhv", key_BHK, matrix_BHKV, precision=_EXACT)


def _step(read: str, state: State, token: Inputs) -> tuple[State, jax.Array | None]:
    """One token of (S2.1), or of (S5.1) with momentum; the arrays of `token` have no time axis."""

    def column(gate_BH: jax.Array) -> jax.Array:
        return gate_BH[:, :, None, None]

    if token.reset is not None:
        empty = token.reset[:, None, None, None] > 0
        state = jax.tree.map(lambda x: jnp.where(empty, 0, x), state)
    s, z = state
    y = _rows(token.q, s) if token.q is not None and read == "before" else None
    write = token.k[..., :, None] * token.u[..., None, :]
    kept = s if token.log_alpha is None else column(jnp.exp(token.log_alpha)) * s
    if token.eta is not None:
        kept -= column(token.eta) * token.k[..., :, None] * _rows(token.k, s)[..., None, :]
    if token.log_mu is None or z is None:
        s = kept + write
    else:
        z = column(jnp.exp(token.log_mu)) * z + write
        s = kept + (z if token.mask is None else column(token.mask) * z)
    if token.q is not None and read == "after":
        y = _rows(token.q, s)
    return State(s, z), y


def forward(
    inputs: Inputs, state: State, *, read: str, config: Config, precision: str
) -> tuple[jax.Array | None, State]:
    """Token loop. `read` is "before" or "after"; there is no tile, and one precision."""
    del config, precision
    group = value_heads_per_key_head(inputs)
    if group > 1:
        repeat = lambda x: None if x is None else jnp.repeat(x, group, axis=2)  # noqa: E731
        inputs = inputs._replace(q=repeat(inputs.q), k=repeat(inputs.k))
    tokens_TBH = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0).astype(state.s.dtype), inputs)
    state, y_TBHV = jax.lax.scan(lambda carry, token: _step(read, carry, token), state, tokens_TBH)
    y = None if y_TBHV is None else jnp.moveaxis(y_TBHV, 0, 1).astype(inputs.k.dtype)
    return y, state
