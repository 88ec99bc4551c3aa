"""What is known of each level of a model while it trains: how far and how long ago its parameters moved.

A level is a CMS level ("level_0", fast first) of all blocks together; "rest" is every other parameter.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hope_jax.optimizers import steps_until_due
from hope_jax.training.optimizer import CMS_LEVEL
from hope_jax.types import path_string

REST = "rest"


def level_of(path: str) -> str:
    """The level of a parameter, by its path.

    >>> level_of("blocks/cms/level_1/w1"), level_of("blocks/attention/wq")
    ('level_1', 'rest')
    """
    found = CMS_LEVEL.search(path)
    return f"level_{found[1]}" if found else REST


def by_level(tree: Any) -> dict[str, list[Any]]:
    """The leaves of a tree like the parameters, by level."""
    levels: dict[str, list[Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        levels.setdefault(level_of(path_string(path)), []).append(leaf)
    return dict(sorted(levels.items()))


def norms(tree: Any) -> dict[str, jax.Array]:
    """The global norm of each level, float32[]."""
    return {level: optax.tree.norm(leaves) for level, leaves in by_level(tree).items()}


def steps_since_update(opt_state: Any, levels: list[str], periods: tuple[int, ...]) -> dict[str, jax.Array]:
    """Steps since each level was written, int32[]; 0 in the step that writes it, the step's number before the first.

    Args:
      opt_state: after the step.
      levels: their names.
      periods: of the CMS levels, in steps; a level without one is written in every step.
    """
    due = steps_until_due(opt_state)
    every = {f"level_{i}": period for i, period in enumerate(periods)}

    def waited(level: str) -> jax.Array:
        period = every.get(level, 1)
        return jnp.zeros((), jnp.int32) if period == 1 else period - due[f"every_{period}"]

    return {level: waited(level) for level in levels}
