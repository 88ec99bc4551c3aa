"""A small Vision Transformer as an ordinary flax module, so that optimizers meet a model that is not ours.

As published (Dosovitskiy et al. 2021, arXiv:2010.11929) with changes that are usual for small ones: the mean over
patches in the place of a class token, normalised queries and keys, projections without bias.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.training import Model


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Shape of a Vision Transformer.

    Attributes:
      size: height and width of an image.
      channels: of an image.
      classes: how many.
      patch: height and width of a patch; divides `size`.
      dim: width.
      layers: blocks.
      heads: of attention; divide `dim`.
    """

    size: int
    channels: int
    classes: int
    patch: int
    dim: int
    layers: int
    heads: int


class Attention(nnx.Module):
    """Every position attends to every other; queries and keys are normalised.

    Kernels are [dim, dim]: of those of flax itself, [dim, heads, width], a rule for matrices would take [heads, width].
    """

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        dim = config.dim
        self.heads = config.heads
        self.q, self.k, self.v, self.out = (nnx.Linear(dim, dim, use_bias=False, rngs=rngs) for _ in range(4))
        self.q_norm, self.k_norm = (nnx.RMSNorm(dim // config.heads, rngs=rngs) for _ in range(2))

    def __call__(self, x_BPD: jax.Array) -> jax.Array:
        q, k, v = (layer(x_BPD).reshape(*x_BPD.shape[:2], self.heads, -1) for layer in (self.q, self.k, self.v))
        read_BPHK = jax.nn.dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.out(read_BPHK.reshape(x_BPD.shape))


class Block(nnx.Module):
    """Attention and an MLP of four times the width, each behind a norm and beside a residual."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        dim = config.dim
        self.attention_norm, self.mlp_norm = (nnx.LayerNorm(dim, rngs=rngs) for _ in range(2))
        self.attention = Attention(config, rngs)
        self.up, self.down = nnx.Linear(dim, 4 * dim, rngs=rngs), nnx.Linear(4 * dim, dim, rngs=rngs)

    def __call__(self, x_BPD: jax.Array) -> jax.Array:
        x_BPD = x_BPD + self.attention(self.attention_norm(x_BPD))
        return x_BPD + self.down(nnx.gelu(self.up(self.mlp_norm(x_BPD))))


class ViT(nnx.Module):
    """Images [B, S, S, C] -> logits [B, classes]."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        patches = (config.size // config.patch) ** 2
        window = (config.patch, config.patch)
        self.embedding = nnx.Conv(config.channels, config.dim, window, window, padding="VALID", rngs=rngs)
        self.place_embedding = nnx.Param(0.02 * rngs.normal((patches, config.dim)))
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(config.dim, rngs=rngs)
        self.head = nnx.Linear(config.dim, config.classes, rngs=rngs)

    def __call__(self, images_BSSC: jax.Array) -> jax.Array:
        x = self.embedding(images_BSSC)
        x_BPD = x.reshape(x.shape[0], -1, x.shape[-1]) + self.place_embedding[...][None]
        for block in self.blocks:
            x_BPD = block(x_BPD)
        return self.head(self.norm(x_BPD).mean(axis=1))


def vit(config: ViTConfig) -> Model:
    """`Model(init, apply)` of a Vision Transformer; parameters are the tree of `nnx.state`.

    Raises:
      ValueError: the patch does not divide the image, or the heads the width.
    """
    for name, whole, part in (("size", config.size, config.patch), ("dim", config.dim, config.heads)):
        if whole % part:
            raise ValueError(f"{name} must be a multiple of {'patch' if name == 'size' else 'heads'}; got {config}")
    graph = nnx.graphdef(nnx.eval_shape(lambda: ViT(config, nnx.Rngs(0))))

    def init(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(ViT(config, nnx.Rngs(key)), nnx.Param))

    def apply(params: Any, images_BSSC: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(jnp.asarray(images_BSSC))

    return Model(init, apply)
