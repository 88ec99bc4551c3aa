"""The interface of a sequence layer, and the two pieces most of them share: causal convolution and l2 norm."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hope_jax.types import Params


class SequenceLayer(NamedTuple):
    """A layer over time for one example; state in, state out."""

    init: Callable[[jax.Array], Params]  # rng key -> outer parameters
    init_state: Callable[[Params], Any]  # differentiable: start states are outer parameters
    apply: Callable[..., tuple[Any, jax.Array]]  # (params, state, r_TD, phase=None, mask_T=None) -> (state, y_TD)


def project(x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    """`x @ weight` with products in `dtype`, the layer's compute dtype; the result is as wide as the weight."""
    return (x.astype(dtype) @ weight.astype(dtype)).astype(weight.dtype)


def short_conv(kernel: jax.Array, tail: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Causal depthwise convolution that goes on where the last call stopped (spec S7.2).

    Args:
        kernel: [W, ...], one filter of W taps per channel, the last tap for the current token.
        tail: [W - 1, ...], the inputs before this call.
        x: [T, ...].

    Returns:
        The new tail and the output [T, ...].
    """
    window, length = kernel.shape[0], x.shape[0]
    full = jnp.concatenate([tail, x])
    y = sum((full[i : i + length] * kernel[i][None] for i in range(window)), jnp.zeros_like(x))
    return full[full.shape[0] - (window - 1) :], y


def identity_conv(window: int, shape: tuple[int, ...]) -> jax.Array:
    """Filters that pass their input through: the last tap is one."""
    return jnp.zeros((window, *shape)).at[-1].set(1.0)


def l2_normalize(x: jax.Array) -> jax.Array:
    """x / sqrt(||x||^2 + 1e-6) over the last axis (spec S7.2)."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
