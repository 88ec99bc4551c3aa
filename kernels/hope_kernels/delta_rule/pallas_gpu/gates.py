"""The gates of a tile as the kernels want them: rows of float32, one value per token, computed outside the kernels.

Row by row: the logs of the decay since the start of the tile, up to and including the token and up to the token
before; how many documents began in the tile up to the token; eta; and, zero where a document began in between, the
decays from the start of the tile to the token before, the same times eta, to the read of the token, from the token to
the end of the tile, and of the whole tile.
"""

import jax
import jax.numpy as jnp

from hope_kernels.delta_rule.pallas_gpu.warpgroup import TILE

INCLUSIVE, EXCLUSIVE, DOCUMENT, ETA, BEFORE, ERASE, READ, CARRY, WHOLE = ROWS = range(9)


def gate_rows(
    eta: jax.Array | None,
    log_alpha: jax.Array | None,
    reset: jax.Array | None,
    shape: tuple[int, ...],
    *,
    before: bool,
) -> jax.Array:
    """eta, log_alpha [B, T, H], reset [B, T] -> [B, H, N, 9, C] for shape (B, T, H), T a multiple of C."""
    batch, tokens, heads = shape

    def tiled(x_BTH: jax.Array | None, fill: float) -> jax.Array:
        if x_BTH is None:
            return jnp.full((batch, heads, tokens // TILE, TILE), fill, jnp.float32)
        return jnp.moveaxis(x_BTH.astype(jnp.float32), 2, 1).reshape(batch, heads, -1, TILE)

    log_BHNC = tiled(log_alpha, 0.0)
    inclusive = jnp.cumsum(log_BHNC, -1)
    exclusive = inclusive - log_BHNC
    eta_BHNC = tiled(eta, 0.0)
    document = jnp.cumsum(tiled(None if reset is None else jnp.broadcast_to(reset[..., None], shape), 0.0), -1)
    first, last = document == 0, document == document[..., -1:]
    whole = inclusive[..., -1:]
    before_token = jnp.where(first, jnp.exp(exclusive), 0)
    rows = [
        inclusive,
        exclusive,
        document,
        eta_BHNC,
        before_token,
        eta_BHNC * before_token,
        before_token if before else jnp.where(first, jnp.exp(inclusive), 0),
        jnp.where(last, jnp.exp(whole - inclusive), 0),
        jnp.broadcast_to(jnp.where(first[..., -1:], jnp.exp(whole), 0), log_BHNC.shape),
    ]
    return jnp.stack(rows, 3)


def gate_gradients(rows_BHNRC: jax.Array, sums_BHNPSC: jax.Array, *, before: bool) -> tuple[jax.Array, jax.Array]:
    """Gradients of eta and log alpha, [B, T, H], from the sums that `gradients.gradients` leaves.

    A factor exp(G_a - G_b) adds its share of the loss gradient to dG_a and takes it from dG_b; G are the cumulative
    sums of log alpha, so what arrives at G_a counts for every token up to a.
    """
    q_dq, k_row, k_col, k_end, state = jnp.moveaxis(sums_BHNPSC.sum(3), 3, 0)
    d_eta = k_row
    d_exclusive = rows_BHNRC[..., ETA, :] * d_eta
    d_inclusive = -k_col
    if before:
        d_exclusive += q_dq
    else:
        d_inclusive += q_dq
    d_end = k_end.sum(-1) + rows_BHNRC[..., WHOLE, 0] * state.sum(-1)
    d_inclusive = d_inclusive.at[..., -1].add(d_end)
    d_log = jax.lax.cumsum(d_inclusive + d_exclusive, 3, reverse=True) - d_exclusive

    def in_time(x_BHNC: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_BHNC.reshape(*x_BHNC.shape[:2], -1), 1, 2)

    return in_time(d_eta), in_time(d_log)
