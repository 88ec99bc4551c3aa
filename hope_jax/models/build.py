"""From a config to a model."""

import dataclasses

from .config import ModelConfig
from .fast_levels import with_fast_levels
from .lm import LM, skeleton


def build_lm(config: ModelConfig) -> LM:
    """The language model that a config describes.

    Args:
      config: a `ModelConfig`.

    Returns:
      `LM(init, init_state, apply, reset)`, pure functions over nested dicts (see `LM`).

    Example:
      >>> import jax
      >>> lm = build_lm(ModelConfig(name="transformer", dim=16, layers=1))
      >>> params = lm.init(jax.random.key(0))
      >>> tokens = jax.numpy.zeros((1, 8), int)
      >>> state, logits = lm.apply(params, lm.init_state(params, 1), tokens, phase=0)
      >>> logits.shape
      (1, 8, 256)
    """
    return with_fast_levels(config) if config.adapts else skeleton(config)


def build(name: str, config: ModelConfig | None = None) -> LM:
    """The language model of a named architecture.

    Args:
      name: one of `architectures.ARCHITECTURES`.
      config: everything else; None takes the defaults.

    Raises:
      ValueError: no such architecture, or a config that does not fit it.

    Example:
      >>> import jax
      >>> lm = build("delta_net", ModelConfig(dim=16, layers=1))
      >>> sorted(lm.init(jax.random.key(0)))
      ['blocks', 'embedding', 'final_norm']
    """
    return build_lm(dataclasses.replace(config or ModelConfig(), name=name))
