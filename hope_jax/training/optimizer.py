"""The outer optimizer: clipped AdamW with warm-up and cosine, and slow levels that step every k-th step.

A level whose chunk is longer than a training step accumulates its gradients and writes its weights at the
boundary: `cms_schedule`. Labels decide which parameters belong to which period (`period_of`).
"""

import re
from typing import Any

import jax
import optax

from hope_jax.matrix_parameters import MATRIX, hidden_matrices
from hope_jax.optimizers import cms_schedule
from hope_jax.training.config import TrainConfig
from hope_jax.types import path_string

CMS_LEVEL = re.compile(r"(?:^|/)cms/level_(\d+)/")


def learning_rate_schedule(config: TrainConfig, period: int = 1) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then a cosine to `final_learning_rate`, where it stays.

    Args:
      config: the run's.
      period: training steps per call of the schedule, for a level that steps every `period` steps.
    Returns:
      Number of updates so far -> learning rate. The first update is already greater than zero.
    """
    warmup = min(config.warmup_steps, config.schedule_steps // 2)
    cosine = optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (warmup + 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=config.schedule_steps,
        end_value=config.final_learning_rate,
    )
    return lambda count: cosine(count * period)


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay applies to: hidden matrices. Others do not rest at zero."""
    return jax.tree.map(lambda label: label == MATRIX, hidden_matrices(params))


def period_of(path: str, periods: tuple[int, ...]) -> int:
    """Training steps between two writes of a parameter: its CMS level's period, 1 for everything else."""
    level = CMS_LEVEL.search(path)
    return periods[int(level[1])] if level and int(level[1]) < len(periods) else 1


def period_labels(params: Any, periods: tuple[int, ...]) -> Any:
    """A tree of "every_k" labels for `cms_schedule`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: f"every_{period_of(path_string(path), periods)}", params)


def build_optimizer(config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """Global-norm clipping, then AdamW for each period.

    The clipping comes first and sees every gradient, so a slow level accumulates clipped gradients.
    """
    periods = sorted({1, *config.cms_periods})
    levels = cms_schedule(
        {f"every_{period}": period for period in periods},
        {f"every_{period}": _adamw(config, period) for period in periods},
        lambda params: period_labels(params, config.cms_periods),
        reduce="mean",
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), levels)


def _adamw(config: TrainConfig, period: int) -> optax.GradientTransformation:
    return optax.adamw(
        learning_rate_schedule(config, period),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
