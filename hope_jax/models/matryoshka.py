"""Heads within the head: every prefix of the final representation predicts too (Matryoshka, arXiv:2205.13147).

    sum_m c_m CE(h[:m] E[:, :m]^T, next token)          m = ..., D/8, D/4, D/2, D

A nest over width where Nested Learning has one over time: the rows of the head are shared, no parameter is added, and
what is trained so can be cut to a prefix (spec 11.5; measured in experiments/matryoshka.py).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from .config import ModelConfig
from .lm import LM, skeleton


def prefix_widths(config: ModelConfig, count: int) -> tuple[int, ...]:
    """The widths of `count` prefixes, each twice the one before, the last the whole.

    Raises:
      ValueError: no prefix, a width that does not halve so often, or levels that adapt inside the sequence: their own
        loss is that of the whole head.

    Example:
      >>> prefix_widths(ModelConfig(dim=64), 4)
      (8, 16, 32, 64)
    """
    if count < 1 or config.dim % 2 ** (count - 1):
        raise ValueError(
            f"{count} prefixes, each half as wide as the next, do not fit dim={config.dim}; give at least one, and a "
            "dim that halves so often"
        )
    if config.adapts:
        raise ValueError(
            f"prefixes are for models without levels that adapt inside the sequence; got chunks of {config.fast_chunks}"
            ": leave out cms_chunks and mlp_chunks"
        )
    return tuple(config.dim >> place for place in reversed(range(count)))


def matryoshka(config: ModelConfig, count: int = 4) -> LM:
    """The model of `config`, with the same parameters, that answers for every prefix of its final representation.

    Args:
      config, count: as in `prefix_widths`, which says what it refuses.

    Returns:
      An `LM` whose `apply` returns `(state, (h_BTD, logits))`: the representation after the final norm, and a tuple of
      [B, T, V] for each prefix, the last of which are the logits of `build_lm(config)`.

    Example:
      >>> import jax
      >>> lm = matryoshka(ModelConfig(name="transformer", dim=16, layers=1), count=2)
      >>> params = lm.init(jax.random.key(0))
      >>> _, (h, logits) = lm.apply(params, lm.init_state(params, 1), jax.numpy.zeros((1, 8), int), phase=0)
      >>> h.shape, [x.shape for x in logits]
      ((1, 8, 16), [(1, 8, 256), (1, 8, 256)])
    """
    return skeleton(config, prefix_widths(config, count))


def matryoshka_losses(
    weights: Sequence[float], prefixes: tuple[jax.Array, tuple[jax.Array, ...]], targets_BT: jax.Array
) -> jax.Array:
    """The weighted sum of what each prefix loses on the next token, in nats.

    Args:
      weights: c, one per prefix, narrowest first. A prefix of weight 0 costs nothing; (0, 0, 0, 1) is the plain loss,
        bit for bit.
      prefixes: the output of a `matryoshka` model.
      targets_BT: int32.

    Returns:
      [B, T] float32.
    """
    _, logits = prefixes
    losses = [
        weight * optax.softmax_cross_entropy_with_integer_labels(one.astype(jnp.float32), targets_BT)
        for weight, one in zip(weights, logits, strict=True)
        if weight
    ]
    return sum(losses[1:], losses[0])
