"""The SwiGLU MLP of Transformer++, with its norm and residual."""

import jax
from flax import nnx

from .norm import RMSNorm
from .params import matmul, matrix


class SwiGLU(nnx.Module):
    """`x + (silu(r @ w_gate) * (r @ w_up)) @ w_down` with `r = RMSNorm(x)`."""

    def __init__(self, dim: int, hidden: int, *, out_gain: float, norm_eps: float = 1e-6, rngs: nnx.Rngs):
        self.norm = RMSNorm(dim, epsilon=norm_eps)
        self.w_gate = matrix(rngs, dim, hidden)
        self.w_up = matrix(rngs, dim, hidden)
        self.w_down = matrix(rngs, hidden, dim, out_gain)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        r_BTD = self.norm(x_BTD)
        h_BTF = jax.nn.silu(matmul(r_BTD, self.w_gate)) * matmul(r_BTD, self.w_up)
        return x_BTD + matmul(h_BTF, self.w_down)
