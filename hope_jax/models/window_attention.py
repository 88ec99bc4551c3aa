"""Causal softmax attention over the last W tokens; its state does not grow with the stream."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from .params import matmul, matrix, normal
from .rotary import rotate


class WindowState(NamedTuple):
    """The last W tokens of each row."""

    key_BWHK: jax.Array  # [B, W, H, K], already rotated
    value_BWHK: jax.Array  # [B, W, H, K]
    valid_BW: jax.Array  # [B, W] bool, False where nothing (or padding) is
    position_B: jax.Array  # [B] int32, tokens read so far, padding included


class WindowAttention(nnx.Module):
    """Each token attends to itself, the W - 1 tokens before it, and to learned persistent vectors.

    The persistent vectors stand in front of every window and have no position (Titans T-19, [P; x]).

    Reference: paper (63); Titans, arXiv:2501.00663, T-19, T-26.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int,
        theta: float | None,
        persistent: int = 0,
        out_gain: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.heads, self.width, self.window, self.theta = heads, dim // heads, window, theta
        self.wq = matrix(rngs, dim, dim)
        self.wk = matrix(rngs, dim, dim)
        self.wv = matrix(rngs, dim, dim)
        self.wo = matrix(rngs, dim, dim, out_gain)
        self.persistent = persistent
        if persistent:
            self.persistent_PD = normal(rngs, (persistent, dim), 1.0)

    def init_state(self, batch_size: int) -> WindowState:
        """An empty window."""
        slots = (batch_size, self.window)
        empty = jnp.zeros((*slots, self.heads, self.width), self.wk[...].dtype)
        return WindowState(empty, empty, jnp.zeros(slots, bool), jnp.zeros(batch_size, jnp.int32))

    def __call__(
        self, r_BTD: jax.Array, state: WindowState, *, phase: int | None, mask_BT: jax.Array | None
    ) -> tuple[WindowState, jax.Array]:
        """Attend to the window and, causally, to `r_BTD`; `phase` changes nothing here."""
        del phase
        B, T, _ = r_BTD.shape
        mask_BT = jnp.ones((B, T), bool) if mask_BT is None else mask_BT
        position_BT = state.position_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
        plain_BTHK, k_BTHK, v_BTHK = (self._heads(matmul(r_BTD, w)) for w in (self.wq, self.wk, self.wv))
        q_BTHK, k_BTHK = (rotate(a, position_BT, self.theta) for a in (plain_BTHK, k_BTHK))

        seen = WindowState(
            jnp.concatenate([state.key_BWHK, k_BTHK.astype(state.key_BWHK.dtype)], axis=1),
            jnp.concatenate([state.value_BWHK, v_BTHK.astype(state.value_BWHK.dtype)], axis=1),
            jnp.concatenate([state.valid_BW, mask_BT], axis=1),
            state.position_B + T,
        )
        y_BTHK = self._attend(q_BTHK, plain_BTHK, seen)
        y_BTD = jnp.where(mask_BT[:, :, None], y_BTHK.reshape(r_BTD.shape), 0)
        key, value, valid = (leaf[:, -self.window :] for leaf in seen[:3])
        last = WindowState(key, value, valid, seen.position_B)
        return last, matmul(y_BTD, self.wo)

    def _heads(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD.reshape(*x_BTD.shape[:-1], self.heads, self.width)

    def _attend(self, q_BTHK: jax.Array, plain_BTHK: jax.Array, seen: WindowState) -> jax.Array:
        """Blocks of C = min(W, T) queries, each with its own C keys and the W before them: linear in T."""
        T, W, dtype = q_BTHK.shape[1], self.window, q_BTHK.dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        C = min(W, T)
        count = -(-T // C)

        def blocks(x: jax.Array, more: int = 0) -> jax.Array:  # [B, T (+ W), ...] -> [B, N (+ 1), C, ...]
            x = jnp.pad(x, [(0, 0), (0, count * C - T), *[(0, 0)] * (x.ndim - 2)])
            return x.reshape(x.shape[0], count + more, C, *x.shape[2:])

        def reachable(x: jax.Array) -> jax.Array:  # [B, W + T, ...] -> [B, N, W + C, ...]
            if count == 1:
                return x[:, None]
            x = blocks(x, 1)  # of W tokens: each with the one before
            return jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2)

        keys, values, valid = (reachable(x) for x in seen[:3])
        distance_CS = W + jnp.arange(C)[:, None] - jnp.arange(W + C)[None, :]
        allowed = valid[:, :, None, :] & ((distance_CS >= 0) & (distance_CS < W))[None, None]
        score = jnp.einsum("bnthk,bnshk->bnhts", blocks(q_BTHK), keys.astype(dtype), preferred_element_type=wide)
        score = jnp.where(allowed[:, :, None], score * self.width**-0.5, jnp.finfo(wide).min)
        if self.persistent:
            key_PHK = self._heads(matmul(self.persistent_PD[...].astype(dtype), self.wk))
            value_PHK = self._heads(matmul(self.persistent_PD[...].astype(dtype), self.wv))
            always = jnp.einsum("bnthk,phk->bnhtp", blocks(plain_BTHK), key_PHK, preferred_element_type=wide)
            score = jnp.concatenate([score, always * self.width**-0.5], axis=-1)
        weight = jax.nn.softmax(score).astype(dtype)
        window, persistent = weight[..., : W + C], weight[..., W + C :]
        y = jnp.einsum("bnhts,bnshk->bnthk", window, values.astype(dtype), preferred_element_type=wide)
        if self.persistent:
            y = y + jnp.einsum("bnhtp,phk->bnthk", persistent, value_PHK, preferred_element_type=wide)
        return y.reshape(y.shape[0], count * C, *y.shape[3:])[:, :T].astype(dtype)
