"""One block: a mixer over time, then a map of each token (spec 8.1)."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from .architectures import ARCHITECTURES
from .cms import CMSChain
from .config import ModelConfig
from .norm import RMSNorm
from .swiglu import SwiGLU


class Block(nnx.Module):
    """`x + mixer(RMSNorm(x))`, then the CMS chain or the MLP, each with its own norms and residuals."""

    def __init__(self, config: ModelConfig, make_mixer: Callable, *, rngs: nnx.Rngs):
        norm_eps, out_gain = config.norm_eps, config.out_gain
        self.mixer_norm = RMSNorm(config.dim, epsilon=norm_eps)
        self.mixer = make_mixer(config, rngs)
        if config.has_cms:
            self.cms = build_chain(config, rngs)
        else:
            self.mlp = SwiGLU(config.dim, config.mlp_width, out_gain=out_gain, norm_eps=norm_eps, rngs=rngs)

    def init_state(self, batch_size: int) -> Any:
        """The mixer's state for a batch of fresh rows."""
        return self.mixer.init_state(batch_size)

    def __call__(
        self, x_BTD: jax.Array, state: Any, *, phase: int | None, mask_BT: jax.Array | None
    ) -> tuple[Any, jax.Array]:
        state, x_BTD = self.mix(x_BTD, state, phase=phase, mask_BT=mask_BT)
        return state, self.channel(x_BTD)

    def mix(
        self, x_BTD: jax.Array, state: Any, *, phase: int | None, mask_BT: jax.Array | None
    ) -> tuple[Any, jax.Array]:
        """The part over time."""
        state, y_BTD = self.mixer(self.mixer_norm(x_BTD), state, phase=phase, mask_BT=mask_BT)
        return state, x_BTD + y_BTD

    def channel(self, x_BTD: jax.Array) -> jax.Array:
        """The part for each token."""
        return self.mlp(x_BTD) if hasattr(self, "mlp") else self.cms(x_BTD)


class HybridBlock(nnx.Module):
    """Consecutive blocks with different mixers, which a scan over depth takes as one."""

    def __init__(self, config: ModelConfig, make_mixers: tuple[Callable, ...], *, rngs: nnx.Rngs):
        self.depth = len(make_mixers)
        for i, make_mixer in enumerate(make_mixers):
            setattr(self, f"block_{i}", Block(config, make_mixer, rngs=rngs))

    def init_state(self, batch_size: int) -> Any:
        """One state per block."""
        return tuple(block.init_state(batch_size) for block in self._blocks())

    def __call__(
        self, x_BTD: jax.Array, state: Any, *, phase: int | None, mask_BT: jax.Array | None
    ) -> tuple[Any, jax.Array]:
        after = []
        for block, before in zip(self._blocks(), state, strict=True):
            one, x_BTD = block(x_BTD, before, phase=phase, mask_BT=mask_BT)
            after.append(one)
        return tuple(after), x_BTD

    def _blocks(self) -> list[Block]:
        return [getattr(self, f"block_{i}") for i in range(self.depth)]


def build_chain(config: ModelConfig, rngs: nnx.Rngs) -> CMSChain:
    """The CMS levels of one block."""
    return CMSChain(
        config.dim,
        config.cms_hidden,
        out_gain=config.out_gain,
        independent=config.cms_variant == "independent",
        norm_eps=config.norm_eps,
        rngs=rngs,
    )


def build_block(config: ModelConfig, rngs: nnx.Rngs) -> Block | HybridBlock:
    """What the model repeats over its depth."""
    mixers = ARCHITECTURES[config.name].mixers
    return Block(config, mixers[0], rngs=rngs) if len(mixers) == 1 else HybridBlock(config, mixers, rngs=rngs)
