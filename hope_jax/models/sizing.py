"""Counting parameters, and matching two models by them."""

import dataclasses
import math

import jax

from .build import build_lm
from .config import ModelConfig

TOLERANCE = 0.01


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters of the model, without making any.

    Example:
      >>> count_parameters(ModelConfig(name="transformer", vocab_size=256, dim=64, layers=2, mlp_hidden=1))
      49856
    """
    shapes = jax.eval_shape(build_lm(config).init, jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def match_parameters(config: ModelConfig, target: int) -> ModelConfig:
    """The model with `target` parameters: the width of its MLP or CMS levels, and only if needed its `dim`, is chosen.

    Args:
      config: any model; everything but `mlp_hidden` (`cms_hidden`, all levels equal) and `dim` is kept.
      target: number of parameters to match.

    Returns:
      The config whose count is within 1% of `target`.

    Raises:
      ValueError: no width comes close enough.

    Example:
      >>> config = match_parameters(ModelConfig(name="transformer"), 120_000)
      >>> abs(count_parameters(config) - 120_000) < 1_200
      True
    """
    step = 2 * config.heads  # rotary positions need an even head width
    widths = sorted(range(step, 2 * config.dim + step, step), key=lambda dim: abs(dim - config.dim))
    for dim in (config.dim, *widths):
        fitted = _fit_width(dataclasses.replace(config, dim=dim), target)
        if fitted is not None:
            return fitted
    raise ValueError(
        f"no width and dim up to {2 * config.dim} give {config.layers} layers of {config.name} {target} parameters "
        f"within {TOLERANCE:.0%}; change layers or dim"
    )


def _fit_width(config: ModelConfig, target: int) -> ModelConfig | None:
    """Solve for the width of what follows the mixer: the count is linear in it."""
    one, two = (count_parameters(_with_width(config, width)) for width in (1, 2))
    if one == two:  # no CMS level: `dim` alone decides
        return config if abs(one - target) <= TOLERANCE * target else None
    hidden = 1 + round((target - one) / (two - one))
    if hidden < 1 or abs(one + (hidden - 1) * (two - one) - target) > TOLERANCE * target:
        return None
    return _with_width(config, hidden)


def _with_width(config: ModelConfig, width: int) -> ModelConfig:
    if config.has_cms:
        return dataclasses.replace(config, cms_hidden=(width,) * len(config.cms_hidden))
    return dataclasses.replace(config, mlp_hidden=width)
