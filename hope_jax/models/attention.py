"""Causal softmax attention with rotary positions and a key-value cache of fixed capacity."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from .params import matmul, matrix
from .rotary import rotate


class KVCache(NamedTuple):
    """Keys and values of one layer; S slots, each row at its own position; H counts heads of keys and values."""

    key_BSHK: jax.Array  # [B, S, H, K] float32, already rotated
    value_BSHK: jax.Array  # [B, S, H, K] float32
    valid_BS: jax.Array  # [B, S] bool, False where nothing (or padding) was written
    position_B: jax.Array  # [B] int32, tokens read so far, padding included


class Attention(nnx.Module):
    """Multi-head causal attention that carries its past in a `KVCache`.

    With fewer `kv_heads` than `heads` each head of keys and values serves a group of neighbouring query heads
    (arXiv:2305.13245).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        capacity: int,
        theta: float | None,
        out_gain: float,
        kv_heads: int | None = None,
        head_width: int | None = None,
        scaling: tuple[float, ...] = (),
        rngs: nnx.Rngs,
    ):
        self.kv_heads, self.width = kv_heads or heads, head_width or dim // heads
        self.capacity, self.theta, self.scaling = capacity, theta, scaling
        self.wq = matrix(rngs, dim, heads * self.width)
        self.wk = matrix(rngs, dim, self.kv_heads * self.width)
        self.wv = matrix(rngs, dim, self.kv_heads * self.width)
        self.wo = matrix(rngs, heads * self.width, dim, out_gain)

    def init_state(self, batch_size: int) -> KVCache:
        """An empty cache."""
        slots = (batch_size, self.capacity)
        # Keys are stored as wide as the weights they came from, bfloat16 compute included.
        empty = jnp.zeros((*slots, self.kv_heads, self.width), self.wk[...].dtype)
        return KVCache(empty, empty, jnp.zeros(slots, bool), jnp.zeros(batch_size, jnp.int32))

    def __call__(
        self, r_BTD: jax.Array, cache: KVCache, *, phase: int | None, mask_BT: jax.Array | None
    ) -> tuple[KVCache, jax.Array]:
        """Attend to the cache and, causally, to `r_BTD`.

        Args:
          r_BTD: normalised input.
          cache: the past.
          phase: number of tokens in the cache when it is known while tracing: then only those slots are read.
          mask_BT: False at padding, which neither attends nor is attended to; or numbers of documents (int32), which
            do not attend to each other, 0 at padding, in the one call that fills an empty cache (`phase=0`).

        Returns:
          The cache with these tokens and `y_BTD`. A row that overflows the cache, or whose cache does not
          hold `phase` tokens, is NaN: neither can be refused while tracing, and neither may pass unseen.
        """
        B, T, _ = r_BTD.shape
        self._check_length(T, phase)
        mask_BT = jnp.ones((B, T), bool) if mask_BT is None else mask_BT
        document_BT, mask_BT = (None, mask_BT) if mask_BT.dtype == bool else (mask_BT, mask_BT > 0)
        position_BT = cache.position_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
        q_BTHK, k_BTHK, v_BTHK = (self._heads(matmul(r_BTD, w)) for w in (self.wq, self.wk, self.wv))
        q_BTHK, k_BTHK = (rotate(a, position_BT, self.theta, self.scaling) for a in (q_BTHK, k_BTHK))

        cache, seen, usable_B = _write(cache, k_BTHK, v_BTHK, mask_BT, phase)
        slot = jnp.arange(seen.key_BSHK.shape[1], dtype=jnp.int32)
        allowed_BTS = (slot[None, None, :] <= position_BT[:, :, None]) & seen.valid_BS[:, None, :]
        if document_BT is not None:
            allowed_BTS &= document_BT[:, :, None] == document_BT[:, None, :]
        y_BTHK = _attend(q_BTHK, seen.key_BSHK, seen.value_BSHK, allowed_BTS)
        y_BTD = jnp.where(mask_BT[:, :, None], y_BTHK.reshape(B, T, -1), 0)
        return cache, matmul(jnp.where(usable_B[:, None, None], y_BTD, jnp.nan), self.wo)

    def _heads(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD.reshape(*x_BTD.shape[:2], -1, self.width)

    def _check_length(self, length: int, phase: int | None) -> None:
        if (phase or 0) + length > self.capacity:
            raise ValueError(
                f"{(phase or 0) + length} tokens do not fit the attention cache of {self.capacity}; "
                f"raise max_length in the model config or shorten the input"
            )


def _attend(q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, allowed_BTS: jax.Array) -> jax.Array:
    """Softmax attention: products in the dtype of q, softmax and sums in at least float32.

    G query heads to each of the H heads of keys and values.
    """
    wide = jnp.promote_types(q_BTHK.dtype, jnp.float32)
    k_BSHK, v_BSHK = k_BSHK.astype(q_BTHK.dtype), v_BSHK.astype(q_BTHK.dtype)
    q_BTHGK = q_BTHK.reshape(*q_BTHK.shape[:2], k_BSHK.shape[2], -1, q_BTHK.shape[-1])
    score_BHGTS = jnp.einsum("bthgk,bshk->bhgts", q_BTHGK, k_BSHK, preferred_element_type=wide)
    score_BHGTS = score_BHGTS * q_BTHK.shape[-1] ** -0.5
    # A finite floor: a row with nothing to attend to (padding) stays finite, and so does its gradient.
    score_BHGTS = jnp.where(allowed_BTS[:, None, None], score_BHGTS, jnp.finfo(wide).min)
    weight_BHGTS = jax.nn.softmax(score_BHGTS).astype(q_BTHK.dtype)
    y_BTHGK = jnp.einsum("bhgts,bshk->bthgk", weight_BHGTS, v_BSHK, preferred_element_type=wide)
    return y_BTHGK.astype(q_BTHK.dtype).reshape(q_BTHK.shape)


def _write(
    cache: KVCache, k_BTHK: jax.Array, v_BTHK: jax.Array, mask_BT: jax.Array, phase: int | None
) -> tuple[KVCache, KVCache, jax.Array]:
    """Put new tokens into the cache.

    Returns:
      The new cache, the slots a query may look at (`seen`) and which rows are usable.
    """
    B, T = mask_BT.shape
    end_B = cache.position_B + T
    if phase is None:
        rows = jnp.arange(B)[:, None]
        index = (rows, cache.position_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :])
    else:
        index = (slice(None), slice(phase, phase + T))

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[index].set(new.astype(old.dtype), mode="drop")

    def join(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.concatenate([old[:, :phase], new.astype(old.dtype)], axis=1)

    def each(write: Callable[[jax.Array, jax.Array], jax.Array]) -> KVCache:
        key, value = write(cache.key_BSHK, k_BTHK), write(cache.value_BSHK, v_BTHK)
        return KVCache(key, value, write(cache.valid_BS, mask_BT), end_B)

    stored = each(put)
    if phase is None:
        return stored, stored, end_B <= stored.key_BSHK.shape[1]
    # A known phase reads the written slots alone: training never touches the empty capacity.
    return stored, each(join), cache.position_B == phase
