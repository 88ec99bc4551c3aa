"""The levels of a continuum memory system: one two-layer MLP each, a chain or side by side (spec S6.1, 6.5).

When a level is written is not decided here: an ordinary level is stepped by the outer optimizer, a fast one
by the nest around the whole model (`fast_levels`). Both read the same weights, `cms/level_i/{w2, w1}`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from .norm import RMSNorm
from .params import matmul, matrix


class Level(nnx.Module):
    """`gelu(RMSNorm(x) @ w2) @ w1`, the two-layer memory of one clock."""

    def __init__(self, dim: int, hidden: int, *, out_gain: float, norm_eps: float, rngs: nnx.Rngs):
        self.norm = RMSNorm(dim, epsilon=norm_eps)
        self.w2 = matrix(rngs, dim, hidden)
        self.w1 = matrix(rngs, hidden, dim, out_gain)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return matmul(jax.nn.gelu(matmul(self.norm(x_BTD), self.w2)), self.w1)


class CMSChain(nnx.Module):
    """The levels `level_0` (fastest) to `level_{L-1}`, each adding to the output of the one before.

    Independent levels all read the input instead, and a softmax of learned `logits` mixes what they add.
    """

    def __init__(
        self,
        dim: int,
        hidden: tuple[int, ...],
        *,
        out_gain: float,
        independent: bool = False,
        norm_eps: float = 1e-6,
        rngs: nnx.Rngs,
    ):
        self.depth, self.independent = len(hidden), independent
        if independent:
            self.logits = nnx.Param(jnp.zeros(len(hidden), jnp.float32))
        for i, width in enumerate(hidden):
            setattr(self, level_name(i), Level(dim, width, out_gain=out_gain, norm_eps=norm_eps, rngs=rngs))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        levels = [getattr(self, level_name(i)) for i in range(self.depth)]
        if self.independent:
            share = jax.nn.softmax(self.logits[...]).astype(x_BTD.dtype)
            return x_BTD + sum(share[i] * level(x_BTD) for i, level in enumerate(levels))
        for level in levels:
            x_BTD = x_BTD + level(x_BTD)
        return x_BTD


def level_name(index: int) -> str:
    """Key of a level in the parameter dict."""
    return f"level_{index}"
