"""The model of MAD's compression task: the last position's vector, and a decoder that knows only that and a place.

    h = last position of the language model's final norm
    logits_t = W_out norm(gelu(W_2 norm(gelu(W_1 norm(h + place_t)))))        place: sines and cosines

As in the benchmark the decoder does not widen; it sees nothing else of the sequence.
"""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.training import Model
from hope_jax.models import ModelConfig, build_lm


def autoencoder(config: ModelConfig, length: int) -> Model:
    """`Model(init, apply)` whose logits at position t are decoded from the vector of the last position.

    Args:
      config: of the encoder; its head is not used.
      length: tokens per sequence.

    Raises:
      ValueError: the embeddings are tied, so there is no head to leave out.
    """
    if config.tie_embeddings:
        raise ValueError("an autoencoder needs tie_embeddings=False; got True")
    lm = build_lm(config)
    dim = config.dim
    # With the identity in the place of the head, the "logits" are the vectors after the final norm.
    identity = jnp.eye(dim, dtype=jnp.float32)
    place_TD = positions(length, dim)

    def init(key: jax.Array) -> Any:
        encoder_key, *keys = jax.random.split(key, 4)
        encoder = {name: leaf for name, leaf in lm.init(encoder_key).items() if name != "head"}
        shapes = {"w_1": (dim, dim), "w_2": (dim, dim), "w_out": (dim, config.vocab_size)}
        decoder = {
            name: jax.random.normal(k, shape) * dim**-0.5 for (name, shape), k in zip(shapes.items(), keys, strict=True)
        }
        return {"encoder": encoder, "decoder": decoder}

    def apply(params: Any, tokens_BT: jax.Array) -> jax.Array:
        encoder, decoder = {**params["encoder"], "head": identity}, params["decoder"]
        _, h_BTD = lm.apply(encoder, lm.init_state(encoder, tokens_BT.shape[0]), tokens_BT, phase=0)
        x_BTD = h_BTD[:, -1:] + place_TD[None]
        for name in ("w_1", "w_2"):
            x_BTD = jax.nn.gelu(_norm(x_BTD) @ decoder[name])
        return _norm(x_BTD) @ decoder["w_out"]

    return Model(init, apply)


def positions(length: int, dim: int) -> jax.Array:
    """[length, dim] sines and cosines of wavelengths from 2 pi to 20,000 pi."""
    frequency = 10_000.0 ** (-jnp.arange(dim // 2) / (dim // 2))
    angle_TD = jnp.arange(length)[:, None] * frequency[None, :]
    return jnp.concatenate([jnp.sin(angle_TD), jnp.cos(angle_TD)], axis=-1)


def _norm(x_BTD: jax.Array) -> jax.Array:
    return x_BTD * jax.lax.rsqrt((x_BTD**2).mean(axis=-1, keepdims=True) + 1e-6)
