"""Levels outside the sequence: clocks for the outer optimizer, and what happens to their momenta between tasks."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hope_jax.numerics import zeros_wide
from hope_jax.types import Params, leaf_name


class EveryState(NamedTuple):
    pending: Params  # like the parameters, float32 or wider: the sum of the updates since the last step
    due: jax.Array  # int32[]: calls until the rule steps, that call included: k after a step, 1 just before
    inner: optax.OptState


def _cast(x: Any, like: Any) -> jax.Array:
    return x if jnp.asarray(x).dtype == like.dtype else jnp.asarray(x).astype(like.dtype)


def every(k: int, tx: optax.GradientTransformation, reduce: str = "sum") -> optax.GradientTransformationExtraArgs:
    """A level whose chunk is k optimizer steps: accumulate k updates, then step `tx` once on them.

    In between the update is zero and `tx` is not computed (`lax.cond`). `every(1, tx)` is `tx`. Extra arguments
    go to `tx` as they come with the k-th call.

    Args:
        k: calls per step of `tx`, at least 1.
        tx: the level's rule.
        reduce: "sum" (paper (71)) or "mean" of the k updates.

    Raises:
        ValueError: k below 1 or no whole number, or an unknown reduction.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx, w = every(2, optax.sgd(1.0)), jnp.zeros(1)
        >>> u, state = tx.update(jnp.ones(1), tx.init(w), w)
        >>> u.tolist(), tx.update(jnp.ones(1), state, w)[0].tolist()
        ([0.0], [-2.0])

    Reference: paper (71) for a level slower than a training step; spec 4.9.
    """
    _check_period(k, "every(k, tx)")
    if reduce not in ("sum", "mean"):
        raise ValueError(f'every reduces by "sum" or "mean"; got {reduce!r}')
    tx = optax.with_extra_args_support(tx)
    if k == 1:
        return tx

    def init(params: Params) -> EveryState:
        return EveryState(jax.tree.map(zeros_wide, params), jnp.full((), k, jnp.int32), tx.init(params))

    def update(updates: Any, state: Any, params: Params = None, **extra: Any):
        pending = jax.tree.map(lambda a, g: (a + g).astype(a.dtype), state.pending, updates)

        def step() -> tuple[Any, EveryState]:
            total = pending if reduce == "sum" else jax.tree.map(lambda g: g / k, pending)
            new, inner = tx.update(jax.tree.map(_cast, total, updates), state.inner, params, **extra)
            new, inner = jax.tree.map(_cast, (new, inner), (updates, state.inner))
            return new, EveryState(jax.tree.map(jnp.zeros_like, pending), jnp.full_like(state.due, k), inner)

        def wait() -> tuple[Any, EveryState]:
            return jax.tree.map(jnp.zeros_like, updates), EveryState(pending, state.due - 1, state.inner)

        return jax.lax.cond(state.due == 1, step, wait)

    return optax.GradientTransformationExtraArgs(init, update)


def cms_schedule(
    periods: Mapping[Any, int],
    tx: optax.GradientTransformation | Mapping[Any, optax.GradientTransformation],
    labels: Any,
    reduce: str = "sum",
) -> optax.GradientTransformationExtraArgs:
    """Levels of the outer optimizer by parameter label: the parameters labelled l are written every periods[l] steps.

    It is `optax.partition` over `every(periods[l], tx)`: a level gathers its gradients between its writes, and its rule
    is not computed there. `steps_until_due` reads from the state when each level is written next.

    Args:
        periods: steps per write of every label, at least 1.
        tx: one rule for all levels, each with its own state; or a rule for each label, for example with a schedule that
            knows how rarely it is called.
        labels: a tree of labels like the parameters or a prefix of them, or a function that makes it from them.
        reduce: "sum" (paper (71)) or "mean" of a level's gradients between two writes.

    Raises:
        ValueError: a period below 1 or an unknown reduction; labels of `tx` that differ from those of `periods`; at
            `init` a parameter whose label has no period, or a period whose label has no parameter.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> w = {"level_0": jnp.zeros(1), "level_1": jnp.zeros(1)}
        >>> tx = cms_schedule({"fast": 1, "slow": 4}, optax.sgd(1.0), {"level_0": "fast", "level_1": "slow"})
        >>> u, state = tx.update({"level_0": jnp.ones(1), "level_1": jnp.ones(1)}, tx.init(w), w)
        >>> u["level_0"].tolist(), u["level_1"].tolist(), {l: int(n) for l, n in steps_until_due(state).items()}
        ([-1.0], [0.0], {'fast': 1, 'slow': 3})

    Reference: paper (71), CMS levels that are slower than a training step; spec 4.9, 6.8.
    """
    rules = tx if isinstance(tx, Mapping) else dict.fromkeys(periods, tx)
    if set(rules) != set(periods):
        raise ValueError(f"cms_schedule has periods for {_listed(periods)} and rules for {_listed(rules)}")
    for label, k in periods.items():
        _check_period(k, f"cms_schedule's {label!r}")
    parts = optax.partition({label: every(k, rules[label], reduce) for label, k in periods.items()}, labels)

    def init(params: Params) -> optax.OptState:
        found = jax.tree_util.tree_leaves_with_path(labels(params) if callable(labels) else labels)
        for path, label in found:
            if label not in periods:
                raise ValueError(
                    f"{leaf_name(path)} has the label {label!r}, which has no period; there are {_listed(periods)}"
                )
        unused = set(periods) - {label for _, label in found}
        if unused and jax.tree.leaves(params):
            raise ValueError(
                f"no parameter has the label {_listed(unused)}; the labels of the parameters are "
                f"{_listed({label for _, label in found})}: leave its period out, or correct the labels"
            )
        return parts.init(params)

    return optax.GradientTransformationExtraArgs(init, parts.update)


def _check_period(k: Any, what: str) -> None:
    if not isinstance(k, Integral) or k < 1:
        raise ValueError(f"{what} takes a whole number of steps, 1 (each step) or more; got {k}")


def _listed(labels: Any) -> str:
    return ", ".join(sorted(map(repr, labels)))


def steps_until_due(state: Any) -> Any:
    """When the next update is due: calls of `update` until the rule steps, that call included.

    Args:
        state: of `every` or `cms_schedule`, or of a chain or wrapper with one of them inside, the first of which
            counts; any other transformation steps at each call.

    Returns:
        int32[], or for `cms_schedule` (and any `optax.partition`) a dict of them by label.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> int(steps_until_due(every(4, optax.sgd(1.0)).init(jnp.zeros(2))))
        4
    """
    if isinstance(state, EveryState):
        return state.due
    if isinstance(state, optax.transforms.PartitionState):
        masked: Mapping[Any, Any] = state.inner_states
        return {label: steps_until_due(part.inner_state) for label, part in masked.items()}
    if isinstance(state, tuple):
        for part in state:
            if any(map(_is_clocked, jax.tree.leaves(part, is_leaf=_is_clocked))):
                return steps_until_due(part)
    return jnp.ones((), jnp.int32)


def _is_clocked(state: Any) -> bool:
    return isinstance(state, EveryState | optax.transforms.PartitionState)


def carry_momentum(tx: optax.GradientTransformation, state: Any, params: Params) -> Any:
    """The optimizer's state at a task boundary that is not one: momenta are knowledge and go on.

    The counterpart of `reset_momentum` with the same arguments, so that a switch is the choice of one of the two.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx, w = optax.sgd(0.1, momentum=0.9), jnp.ones(2)
        >>> _, state = tx.update(w, tx.init(w), w)
        >>> carry_momentum(tx, state, w)[0].trace.tolist()
        [1.0, 1.0]

    Reference: the paper's section 4.5; spec 4.10.
    """
    del tx, params
    return state


def reset_momentum(tx: optax.GradientTransformation, state: Any, params: Params) -> Any:
    """The optimizer's state at a task boundary where momenta are forgotten.

    Everything in the state that is like the parameters starts again as `tx.init(params)` makes it: momenta, second
    moments, pending sums, cached directions, and the start that `retention` goes back to. So do the numbers kept right
    beside them, which mean nothing without them: the count of Adam's bias correction, of M3's periods, the clock of
    `every`. Carried are the states that keep nothing like the parameters: the counts of schedules, injected
    hyperparameters.

    Args:
        tx: the transformation that the state belongs to.
        state: its state.
        params: the parameters at the boundary.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx, w = optax.adam(lambda count: 0.1 / (1 + count)), jnp.ones(2)
        >>> _, state = tx.update(w, tx.init(w), w)
        >>> adam, schedule = reset_momentum(tx, state, w)
        >>> adam.mu.tolist(), int(adam.count), int(schedule.count)
        ([0.0, 0.0], 0, 1)

    Reference: the paper's section 4.5; spec 4.10.
    """
    fresh = tx.init(params)
    like_params = optax.tree.map_params(tx, lambda _: True, state, transform_non_params=lambda _: False)
    paths = {path for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    owners = set()  # paths of the states that keep something like the parameters
    for path, found in jax.tree_util.tree_leaves_with_path(like_params):
        if found:
            owners.add(path[: _begin(path, paths) - 1])
    return jax.tree_util.tree_map_with_path(
        lambda path, found, old, new: new if found or path[:-1] in owners else old, like_params, state, fresh
    )


def _begin(path: tuple, paths: set[tuple]) -> int:
    """Where a parameter's path begins in that of its part of a state; a memory's own names may follow."""
    cuts = range(len(path) + 1)
    ends = (i for i in cuts if path[i:] in paths)
    return next(ends, None) or next(i for i in cuts if any(path[i : i + len(p)] == p for p in paths))
