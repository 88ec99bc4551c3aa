"""The models every contract test runs over: all architectures, very small."""

import dataclasses

import jax
import jax.numpy as jnp

from hope_jax.models import ARCHITECTURES, ModelConfig

LENGTH = 17  # not a multiple of the chunk sizes below
VOCAB = 40

_SMALL = ModelConfig(
    vocab_size=VOCAB, dim=16, layers=2, heads=2, memory_hidden=8, chunk_proj=4, chunk_mem=4, cms_hidden=(24, 24)
)

CASES = {
    "transformer": dataclasses.replace(_SMALL, name="transformer", max_length=24),
    "hope_attention": dataclasses.replace(_SMALL, name="hope_attention", max_length=24),
    "hope": _SMALL,
    "hope_switches": dataclasses.replace(
        _SMALL, chunk_proj=2, adaptive_q=True, momentum="gate", read="before", mlp_rule="layerwise"
    ),
    "hope_linear": dataclasses.replace(_SMALL, memory="linear", chunk_proj=1, chunk_mem=1, momentum=None, eta_init=1.0),
    "hope_attention_fast": dataclasses.replace(
        _SMALL, name="hope_attention", max_length=24, cms_chunks=(4, 8), cms_hidden=(16, 16)
    ),
    "hope_attention_nested": dataclasses.replace(
        _SMALL, name="hope_attention", max_length=24, cms_chunks=(4, 8), cms_hidden=(16, 16), cms_variant="nested"
    ),
    "hope_attention_independent": dataclasses.replace(
        _SMALL, name="hope_attention", max_length=24, cms_chunks=(4,), cms_variant="independent"
    ),
    "transformer_stacked": dataclasses.replace(
        _SMALL, name="transformer", max_length=24, mlp_chunks=(4, 8), kv_heads=1, head_dim=6
    ),
    "hope_fast": dataclasses.replace(_SMALL, cms_chunks=(4, 8), cms_hidden=(16, 16, 16)),
    "hope_surprise": dataclasses.replace(
        _SMALL, stage=2, static=("k",), surprise=0.9, surprise_temperature=0.3, gate_retention=True
    ),
    "titans_running": dataclasses.replace(_SMALL, name="titans", read="before", eta_init=0.1),
    "delta_net_negative": dataclasses.replace(_SMALL, name="delta_net", erase_max=2.0),  # eigenvalues down to -1
    "miras_moneta": dataclasses.replace(_SMALL, name="miras", miras="moneta", eta_init=0.1),
    "miras_memora": dataclasses.replace(_SMALL, name="miras", miras="memora", eta_init=0.1),
    **{
        name: dataclasses.replace(_SMALL, name=name, max_length=24, window=12, eta_init=0.1)
        for name in sorted(set(ARCHITECTURES) - {"transformer", "hope_attention", "hope"})
    },
}


def distinct_tokens(rows: int = 2, length: int = LENGTH) -> jax.Array:
    """Each row a different order of the same distinct tokens, so that an embedding row is a position."""
    keys = jax.random.split(jax.random.key(7), rows)
    return jnp.stack([jax.random.permutation(key, length) for key in keys])


def next_token_loss(logits_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Mean cross-entropy of each token given the ones before it."""
    log_p = jax.nn.log_softmax(logits_BTV[:, :-1].astype(jnp.promote_types(logits_BTV.dtype, jnp.float32)))
    return -jnp.mean(jnp.take_along_axis(log_p, tokens_BT[:, 1:, None], axis=-1))
