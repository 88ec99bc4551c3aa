"""Rotary positions: pairs of channels turned by an angle that grows with the position."""

import math

import jax
import jax.numpy as jnp


def rotate(
    x_BTHK: jax.Array, position_BT: jax.Array, theta: float | None, scaling: tuple[float, ...] = ()
) -> jax.Array:
    """Turn channel pairs `(i, i + K/2)` by `position * theta^(-2i/K)`; angles in at least float32.

    Args:
      x_BTHK: queries or keys, K even.
      position_BT: integer positions, B may be 1.
      theta: the longest wavelength is about `2 pi theta` tokens; None turns nothing, so no position is known.
      scaling: () or the four numbers of `stretched`.

    Returns:
      Array of x's shape and dtype. Products of rotated queries and keys depend on position differences only
      (RoFormer, arXiv:2104.09864).
    """
    if theta is None:
        return x_BTHK
    half = x_BTHK.shape[-1] // 2
    wide = jnp.promote_types(x_BTHK.dtype, jnp.float32)
    frequency = jnp.asarray(theta, wide) ** (-jnp.arange(half, dtype=wide) / half)
    frequency = stretched(frequency, *scaling) if scaling else frequency
    angle = jnp.einsum("bt,k->btk", position_BT.astype(wide), frequency)[:, :, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x_BTHK[..., :half].astype(wide), x_BTHK[..., half:].astype(wide)
    shape = (*x_BTHK.shape[:-1], half)
    cos, sin = (jnp.broadcast_to(a, shape) for a in (cos, sin))
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x_BTHK.dtype)


def stretched(frequency: jax.Array, factor: float, low: float, high: float, length: float) -> jax.Array:
    """Frequencies for contexts `factor` times as long as those of training ("llama3" scaling).

    Those that turn more than `high` times within the training length stay, those that turn less than `low` times
    become `factor` times slower, and between the two the frequencies are interpolated linearly in the number of turns.

    Args:
      frequency: angle per token, any shape.
      factor: how much slower the slowest become.
      low, high: turns within `length` tokens.
      length: tokens of the contexts of training.
    """
    turns = length * frequency / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return (kept + (1 - kept) / factor) * frequency
