"""Softmax attention: a memory without weights, whose regression is solved anew for every query."""

import jax
import jax.numpy as jnp


def softmax_attention(query: jax.Array, key: jax.Array, value: jax.Array, window: int | None = None) -> jax.Array:
    """Causal softmax attention, the weighted mean of the values seen so far.

        y_t = sum_i s_i v_i / sum_i s_i = argmin_m sum_i s_i ||v_i - m||^2        s_i = exp(q_t . k_i / sqrt(K))

    Args:
        query, key: [T, K].
        value: [T, V].
        window: c, how many tokens are seen, the current one included; None: all.

    Returns:
        [T, V] in the dtype of the values; weights are computed in float32 or wider.

    Raises:
        ValueError: a window below 1.

    Example:
        >>> x = jnp.array([[0.0], [2.0], [4.0]])
        >>> softmax_attention(jnp.zeros((3, 1)), x, x)[:, 0].tolist()
        [0.0, 1.0, 2.0]
        >>> softmax_attention(jnp.zeros((3, 1)), x, x, window=2)[:, 0].tolist()
        [0.0, 1.0, 3.0]

    Reference: paper (62), and (63) with a window; spec 2.5.
    """
    if window is not None and window < 1:
        raise ValueError(f"window is a number of tokens, at least 1, or None; got {window}")
    length, width = key.shape
    lag = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    seen = (lag >= 0) & (lag < (length if window is None else window))
    wide = jnp.promote_types(value.dtype, jnp.float32)
    logits = jnp.einsum("tk,sk->ts", query, key, preferred_element_type=wide) / width**0.5
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
    return weights.astype(value.dtype) @ value
