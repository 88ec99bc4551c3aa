"""The chunked form as one would first write it: the base that the benchmark compares with on a CPU.

All chunks are prepared at once, each system is solved by `jax.scipy.linalg.solve_triangular`, a scan hands the state
on, and jax differentiates the whole. It is correct for what the benchmark measures (erase and decay, tokens a multiple
of the chunk, reads after the write) and is no implementation of the operation.
"""

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from hope_kernels.delta_rule.arg_specs import ArgSpec

_CHUNK = 64


def why_not(spec: ArgSpec) -> str | None:
    """Why `spec` is not for it, as one phrase, or None."""
    if not (spec.erase and spec.decay) or spec.momentum or spec.documents > 1 or spec.key_heads:
        return "it is written for erase and decay, and for nothing else"
    if spec.tokens % min(_CHUNK, spec.tokens):
        return f"it takes multiples of {_CHUNK} tokens; there are {spec.tokens}"
    if spec.dtype not in ("float32", "float64"):
        return f"it is written for float32, not {spec.dtype}"
    return None


def chunked(
    q: jax.Array,
    k: jax.Array,
    u: jax.Array,
    eta: jax.Array,
    *,
    log_alpha: jax.Array,
    initial_state: jax.Array,
    chunk: int = _CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Reads [B, T, H, V] after the write, and the final state [B, H, K, V].

    Args:
        q, k: [B, T, H, K].
        u: [B, T, H, V].
        eta, log_alpha: [B, T, H].
        initial_state: [B, H, K, V].
        chunk: tokens solved at once; it must divide T.

    Raises:
        ValueError: T is not a multiple of `chunk`.

    Reference: spec (S5.2), (S5.3); the README of this folder.
    """
    batch, tokens, heads, value_width = u.shape
    if tokens % chunk:
        raise ValueError(f"chunk must divide the tokens; got {chunk} and {tokens}")

    def cut(x: jax.Array) -> jax.Array:  # [B, T, H, ...] -> [N, B, H, C, ...]
        x = x.reshape(batch, tokens // chunk, chunk, heads, *x.shape[3:])
        return jnp.moveaxis(jnp.moveaxis(x, 3, 2), 1, 0)

    q, k, u, eta, log_alpha = map(cut, (q, k, u, eta, log_alpha))
    total = jnp.cumsum(log_alpha, axis=-1)
    before = total - log_alpha
    lower = jnp.tril(jnp.ones((chunk, chunk), bool))
    ratio = jnp.exp(jnp.where(lower, total[..., :, None] - total[..., None, :], -jnp.inf))
    ratio_before = jnp.exp(jnp.where(jnp.tril(lower, -1), before[..., :, None] - total[..., None, :], -jnp.inf))
    system = eta[..., None] * ratio_before * (k @ jnp.swapaxes(k, -1, -2))
    recalled_by = (eta * jnp.exp(before))[..., None] * k
    solved = solve_triangular(system, jnp.concatenate([u, recalled_by], -1), lower=True, unit_diagonal=True)
    scores = ratio * (q @ jnp.swapaxes(k, -1, -2))
    arriving = jnp.exp(total[..., -1:] - total)[..., None] * k

    def step(state: jax.Array, xs: tuple) -> tuple[jax.Array, jax.Array]:
        solved, scores, q, arriving, total = xs
        w = solved[..., :value_width] - solved[..., value_width:] @ state
        y = jnp.exp(total)[..., None] * (q @ state) + scores @ w
        state = jnp.exp(total[..., -1])[..., None, None] * state + jnp.swapaxes(arriving, -1, -2) @ w
        return state, y

    state, y = jax.lax.scan(step, initial_state, (solved, scores, q, arriving, total))
    return jnp.moveaxis(y, (0, 3), (1, 2)).reshape(batch, tokens, heads, value_width), state
