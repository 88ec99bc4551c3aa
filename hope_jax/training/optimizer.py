"""The outer optimizer: clipped AdamW with warm-up and cosine, and slow levels that step every k-th step.

A level whose chunk is longer than a training step accumulates its gradients and writes its weights at the
boundary: `cms_schedule`. Labels decide which parameters belong to which period (`period_of`).
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
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


def carry_optimizer(old: Any, fresh: Any, added: int = 0) -> Any:
    """The state with which a new run goes on with the momenta of another (spec 4.10); its schedule starts anew.

    Where both have the same levels and periods, everything but the count of the schedule is carried: momenta, the
    gradients that slow levels have gathered, and how far they are from their next write. Otherwise each parameter keeps
    its moments, whatever level it belongs to now, and the clocks start anew; a new parameter has no moments yet, and
    the bias correction of the others (its first updates are the smaller for it).

    Args:
      old: state of a `build_optimizer`.
      fresh: what the optimizer of the new run makes of its parameters.
      added: CMS levels that the new run has in front: level i was level i - added.
    """
    if not added and jax.tree.structure(old) == jax.tree.structure(fresh):
        return _map_states(optax.ScaleByScheduleState, _restart, old)
    moments = {}  # by path: first and second moment, and the count of their bias correction
    for adam in _states(optax.ScaleByAdamState, old):
        paths = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(adam.mu)]
        for path, mu, nu in zip(paths, jax.tree.leaves(adam.mu), jax.tree.leaves(adam.nu), strict=True):
            moments[path] = (mu, nu, adam.count)

    def go_on(adam: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
        def of(path: Any, new: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            return moments.get(_path_before(path_string(path), added), (new, new, adam.count))

        found = jax.tree_util.tree_map_with_path(of, adam.mu)
        mu, nu, counts = (jax.tree.map(lambda _, one, i=i: one[i], adam.mu, found) for i in range(3))
        return optax.ScaleByAdamState(functools.reduce(jnp.maximum, jax.tree.leaves(counts)), mu, nu)

    return _map_states(optax.ScaleByAdamState, go_on, fresh)


def _restart(schedule: optax.ScaleByScheduleState) -> optax.ScaleByScheduleState:
    return optax.ScaleByScheduleState(jnp.zeros_like(schedule.count))


def _path_before(path: str, added: int) -> str | None:
    """The path of a parameter before some CMS levels were added in front, None for one of those.

    >>> _path_before("blocks/cms/level_2/w1", 1), _path_before("blocks/cms/level_0/w1", 1), _path_before("head", 1)
    ('blocks/cms/level_1/w1', None, 'head')
    """
    level = CMS_LEVEL.search(path)
    if not level:
        return path
    number = int(level[1]) - added
    return f"{path[: level.start(1)]}{number}{path[level.end(1) :]}" if number >= 0 else None


def _map_states(kind: type, change: Any, tree: Any) -> Any:
    """A tree with the states of one kind in it changed."""
    is_one = functools.partial(_is_a, kind)
    return jax.tree.map(lambda node: change(node) if is_one(node) else node, tree, is_leaf=is_one)


def _states(kind: type, tree: Any) -> list[Any]:
    is_one = functools.partial(_is_a, kind)
    return [node for node in jax.tree.leaves(tree, is_leaf=is_one) if is_one(node)]


def _is_a(kind: type, node: Any) -> bool:
    return isinstance(node, kind)
