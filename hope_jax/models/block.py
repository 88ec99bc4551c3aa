"""One block: a mixer over time, then a map of each token (spec 8.1)."""

from typing import Any

import jax
from flax import nnx

from .attention import Attention
from .cms import CMSChain
from .config import ModelConfig
from .hope_mixer import HopeMixer
from .norm import RMSNorm
from .swiglu import SwiGLU


class Block(nnx.Module):
    """`x + mixer(RMSNorm(x))`, then the CMS chain or the MLP, each with its own norms and residuals."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.mixer_norm = RMSNorm(config.dim, epsilon=config.norm_eps)
        self.mixer = _mixer(config, rngs)
        if config.name == "transformer":
            self.mlp = SwiGLU(
                config.dim, config.mlp_width, out_gain=_out_gain(config), norm_eps=config.norm_eps, rngs=rngs
            )
        else:
            independent = config.cms_variant == "independent"
            self.cms = CMSChain(
                config.dim,
                config.cms_hidden,
                out_gain=_out_gain(config),
                independent=independent,
                norm_eps=config.norm_eps,
                rngs=rngs,
            )

    def init_state(self, batch_size: int) -> Any:
        """The mixer's state for a batch of fresh rows."""
        return self.mixer.init_state(batch_size)

    def __call__(
        self, x_BTD: jax.Array, state: Any, *, phase: int | None, mask_BT: jax.Array | None
    ) -> tuple[Any, jax.Array]:
        state, y_BTD = self.mixer(self.mixer_norm(x_BTD), state, phase=phase, mask_BT=mask_BT)
        x_BTD = x_BTD + y_BTD
        return state, self.mlp(x_BTD) if hasattr(self, "mlp") else self.cms(x_BTD)


def _out_gain(config: ModelConfig) -> float:
    """Output matrices of all branches start smaller, so that the residual stream keeps its scale."""
    return config.branches**-0.5


def _mixer(config: ModelConfig, rngs: nnx.Rngs) -> HopeMixer | Attention:
    if config.name == "hope":
        return HopeMixer(config, out_gain=_out_gain(config), rngs=rngs)
    return Attention(
        config.dim,
        config.heads,
        capacity=config.max_length,
        theta=config.rope_theta,
        kv_heads=config.kv_heads,
        head_width=config.head_width,
        scaling=config.rope_llama3,
        out_gain=_out_gain(config),
        rngs=rngs,
    )
