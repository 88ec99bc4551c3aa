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
    """The transformer with `target` parameters: its MLP width, and only if needed its `dim`, is chosen.

    Args:
      config: a transformer; everything but `mlp_hidden` and `dim` is kept.
      target: number of parameters to match.

    Returns:
      The config whose count is within 1% of `target`.

    Raises:
      ValueError: `config` is not a transformer, or no width comes close enough.

    Example:
      >>> config = match_parameters(ModelConfig(name="transformer"), 120_000)
      >>> abs(count_parameters(config) - 120_000) < 1_200
      True
    """
    if config.name != "transformer":
        raise ValueError(f"only a transformer is fitted to a number of parameters; got name={config.name!r}")
    step = 2 * config.heads  # rotary positions need an even head width
    widths = sorted(range(step, 2 * config.dim + step, step), key=lambda dim: abs(dim - config.dim))
    for dim in (config.dim, *widths):
        fitted = _fit_mlp(dataclasses.replace(config, dim=dim), target)
        if fitted is not None:
            return fitted
    raise ValueError(
        f"no MLP width and dim up to {2 * config.dim} give {config.layers} layers {target} parameters within "
        f"{TOLERANCE:.0%}; change layers or dim"
    )


def _fit_mlp(config: ModelConfig, target: int) -> ModelConfig | None:
    """Solve for the MLP width: the count is linear in it."""
    one, two = (count_parameters(dataclasses.replace(config, mlp_hidden=width)) for width in (1, 2))
    hidden = 1 + round((target - one) / (two - one))
    if hidden < 1 or abs(one + (hidden - 1) * (two - one) - target) > TOLERANCE * target:
        return None
    return dataclasses.replace(config, mlp_hidden=hidden)
