"""Memories: what is remembered with (spec 2.1). Each is a pair of pure functions.

Weights are stored for row vectors: `y = x @ w` (spec 0, "Two layouts").
"""

import itertools

import jax
import jax.numpy as jnp

from hope_jax.types import Linear, Memory, Params


def _normal(key: jax.Array, shape: tuple[int, ...], scale: float) -> jax.Array:
    return scale * jax.random.normal(key, shape, jnp.float32)


def linear_memory(key_width: int, value_width: int, init_scale: float = 0.0) -> Memory:
    """A matrix memory, y = x @ w.

    Args:
        key_width: K.
        value_width: V.
        init_scale: standard deviation of the start weights times sqrt(K); 0 starts empty.

    Example:
        >>> import jax
        >>> memory = linear_memory(4, 3)
        >>> memory.apply(memory.init(jax.random.key(0)), jax.numpy.ones((2, 4))).shape
        (2, 3)

    Reference: spec 2.1; the memory of linear attention, paper (15).
    """

    def init(key: jax.Array) -> Params:
        return {"w": _normal(key, (key_width, value_width), init_scale / key_width**0.5)}

    def apply(params: Params, x: jax.Array, linear: Linear = jnp.matmul) -> jax.Array:
        return linear(x, params["w"])

    return Memory(init, apply)


class MLPMemory(Memory):
    """A memory that `hope_kernels.mlp_memory` knows how to write."""

    residual: bool


def mlp_memory(width: int, hidden: int, residual: bool = True, init_scale: float = 0.5) -> MLPMemory:
    """The two-layer memory y = x + gelu(x @ w2) @ w1, without biases.

    Args:
        width: K = V, both of keys and of values.
        hidden: F.
        residual: keep the `x +`.
        init_scale: standard deviation of w1 times sqrt(F); w2 has 1 / sqrt(K).

    Example:
        >>> import jax
        >>> memory = mlp_memory(4, 8)
        >>> memory.apply(memory.init(jax.random.key(0)), jax.numpy.ones((2, 4))).shape
        (2, 4)

    Reference: paper (89), spec 2.1.
    """

    def init(key: jax.Array) -> Params:
        key1, key2 = jax.random.split(key)
        return {
            "w1": _normal(key1, (hidden, width), init_scale / hidden**0.5),
            "w2": _normal(key2, (width, hidden), width**-0.5),
        }

    def apply(params: Params, x: jax.Array, linear: Linear = jnp.matmul) -> jax.Array:
        y = linear(jax.nn.gelu(linear(x, params["w2"])), params["w1"])
        return x + y if residual else y

    memory = MLPMemory(init, apply)
    memory.residual = residual
    return memory


def deep_memory(widths: tuple[int, ...], residual: bool = False, init_scale: float = 1.0) -> Memory:
    """An MLP of `len(widths) - 1` layers, gelu between them, without biases.

    Args:
        widths: K, hidden widths ..., V.
        residual: add the input to the output; needs K = V.
        init_scale: standard deviation of the weights times the square root of their input width.

    Raises:
        ValueError: fewer than two widths, or a residual between unequal widths.

    Example:
        >>> import jax
        >>> memory = deep_memory((4, 8, 8, 3))
        >>> memory.apply(memory.init(jax.random.key(0)), jax.numpy.ones((2, 4))).shape
        (2, 3)

    Reference: spec 2.1; the deep memory of Titans.
    """
    if len(widths) < 2:
        raise ValueError(f"widths needs at least a key and a value width; got {widths}")
    if residual and widths[0] != widths[-1]:
        raise ValueError(f"a residual memory needs equal key and value widths; got {widths[0]} and {widths[-1]}")
    shapes = list(itertools.pairwise(widths))

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(shapes))
        return {
            f"w{i}": _normal(k, s, init_scale / s[0] ** 0.5) for i, (k, s) in enumerate(zip(keys, shapes, strict=True))
        }

    def apply(params: Params, x: jax.Array, linear: Linear = jnp.matmul) -> jax.Array:
        y = linear(x, params["w0"])
        for i in range(1, len(shapes)):
            y = linear(jax.nn.gelu(y), params[f"w{i}"])
        return x + y if residual else y

    return Memory(init, apply)
