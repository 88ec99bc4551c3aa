"""The two ends of a language model: tokens in, logits out."""

import jax
import jax.numpy as jnp
from flax import nnx

from hope_jax.placement import gathered

from .config import ModelConfig
from .norm import RMSNorm
from .params import normal

EMBEDDING_SCALE = 0.02  # logits start small (0.02 sqrt(D)), so the first loss is close to log(vocabulary)


class Ends(nnx.Module):
    """Embedding, final norm and head; a tied head is the embedding read the other way."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.tied, self.dtype = config.tie_embeddings, config.dtype
        self.embedding = normal(rngs, (config.vocab_size, config.dim), EMBEDDING_SCALE)
        self.final_norm = RMSNorm(config.dim, epsilon=config.norm_eps)
        if not self.tied:
            self.head = normal(rngs, (config.dim, config.vocab_size), EMBEDDING_SCALE)

    def embed(self, token_BT: jax.Array) -> jax.Array:
        """Token vectors in the compute dtype."""
        x_BTD = gathered(self.embedding[...])[token_BT]
        return x_BTD.astype(jnp.bfloat16) if self.dtype == "bfloat16" else x_BTD

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Logits in at least float32, whatever the compute dtype."""
        return self._read(self.final_norm(x_BTD))

    def prefixes(self, x_BTD: jax.Array, widths: tuple[int, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """The representation [B, T, D] that the head reads, and the logits of its first channels, for each width."""
        h_BTD = self.final_norm(x_BTD)
        return h_BTD, tuple(self._read(h_BTD, width) for width in widths)

    def _read(self, h_BTD: jax.Array, width: int | None = None) -> jax.Array:
        """The head on the first `width` channels; None: on all."""
        wide = jnp.promote_types(h_BTD.dtype, jnp.float32)
        h_BTD = h_BTD[..., :width]
        if self.tied:
            weight_VD = self.embedding[...][:, :width].astype(h_BTD.dtype)
            return jnp.einsum("btd,vd->btv", h_BTD, weight_VD, preferred_element_type=wide)
        weight_DV = self.head[...][:width].astype(h_BTD.dtype)
        return jnp.einsum("btd,dv->btv", h_BTD, weight_DV, preferred_element_type=wide)
