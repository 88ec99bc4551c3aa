"""The chain of a continuum memory system: one residual MLP per level, fast levels first (spec S6.1).

When a level is written is not decided here: an ordinary level is stepped by the outer optimizer, a fast one
by the nest around the whole model (`fast_levels`). Both read the same weights, `cms/level_i/{w2, w1}`.
"""

import jax
from flax import nnx

from .norm import RMSNorm
from .params import matmul, matrix


class Level(nnx.Module):
    """`x + gelu(RMSNorm(x) @ w2) @ w1`, the residual two-layer memory of one clock."""

    def __init__(self, dim: int, hidden: int, *, out_gain: float, rngs: nnx.Rngs):
        self.norm = RMSNorm(dim)
        self.w2 = matrix(rngs, dim, hidden)
        self.w1 = matrix(rngs, hidden, dim, out_gain)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD + matmul(jax.nn.gelu(matmul(self.norm(x_BTD), self.w2)), self.w1)


class CMSChain(nnx.Module):
    """The levels `level_0` (fastest) to `level_{L-1}`, each reading the output of the one before."""

    def __init__(self, dim: int, hidden: tuple[int, ...], *, out_gain: float, rngs: nnx.Rngs):
        self.depth = len(hidden)
        for i, width in enumerate(hidden):
            setattr(self, level_name(i), Level(dim, width, out_gain=out_gain, rngs=rngs))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        for i in range(self.depth):
            x_BTD = getattr(self, level_name(i))(x_BTD)
        return x_BTD


def level_name(index: int) -> str:
    """Key of a level in the parameter dict."""
    return f"level_{index}"
