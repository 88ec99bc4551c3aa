"""Every transformation that the contract suite runs: ours, and optax's as a control. A new one is a line of `CASES`."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hope_jax import (
    adamuon,
    cms_schedule,
    deep_momentum,
    delta_momentum,
    dgd,
    every,
    feature_momentum,
    generalised_momentum,
    ggd,
    heavy_ball,
    huber,
    learned_preconditioner,
    m3,
    output_momentum,
    preconditioned_momentum,
    retention,
)


class Case(NamedTuple):
    """One transformation, and what the suite must know to run it.

    `fails` names the checks of `test_optimizer_contract.py` that it does not pass, with the reason; if it passes one of
    them after all, the suite fails.
    """

    make: Callable[..., Any]  # numbers -> transformation
    numbers: dict[str, float]  # hyperparameters that `optax.inject_hyperparams` may inject
    fails: dict[str, str] = {}  # noqa: RUF012  name of a check -> why
    rate: float = 0.1  # learning rate with which it finds the optima, decayed to 0
    matrices: bool = False  # takes matrices only
    extra: Callable[[Any], dict[str, Any]] = lambda params: {}  # parameters -> arguments that its update needs


def _orthonormal_inputs(params: Any) -> dict[str, Any]:
    """The extra argument of a dense `dgd`: key^T key, here I."""
    eye = lambda w: jnp.broadcast_to(jnp.eye(w.shape[-2], dtype=w.dtype), (*w.shape[:-1], w.shape[-2]))  # noqa: E731
    return {"gram": jax.tree.map(eye, params)}


def _fast_and_slow(params: Any) -> Any:
    """The first leaf is fast, the others are slow."""
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(["fast", *["slow"] * (len(leaves) - 1)][: len(leaves)])


def _levels(learning_rate: Any) -> Any:
    return cms_schedule({"fast": 1, "slow": 2}, optax.adam(learning_rate, eps_root=1e-8), _fast_and_slow)


LR = {"learning_rate": 0.1}
NAN = "a square root without eps_root has no derivative at a zero gradient"
NS = ("quintic", 2)  # fewer steps than anyone takes compile faster
MOMENTUM = LR | {"alpha": 0.9}
M3 = LR | {"b1": 0.9, "b3": 0.8, "slow_weight": 0.3}

CASES = {
    # controls
    "optax.sgd": Case(optax.sgd, LR | {"momentum": 0.9}, rate=1e-3),
    "optax.adam": Case(optax.adam, LR | {"b1": 0.9}, {"test_zero_gradients": NAN}),
    "optax.contrib.muon": Case(
        partial(optax.contrib.muon, ns_steps=NS[1]),
        LR,
        {"test_zero_gradients": NAN, "test_odd_leaves": "divides by a size"},
    ),
    # ours
    "every": Case(lambda learning_rate: every(3, optax.adam(learning_rate, eps_root=1e-8)), LR),
    "cms_schedule": Case(_levels, LR),
    "m3": Case(partial(m3, scales=(1, 2), ns=NS), M3),
    "m3, literal": Case(
        partial(m3, mode="literal", scales=(1, 2), ns=NS),
        M3,
        {"test_converges": "its momenta forget nothing, so it swings about the optimum for ever"},
    ),
    "m3, three scales": Case(partial(m3, scales=(1, 2, 3), ns=NS), M3),
    "adamuon": Case(partial(adamuon, ns=NS), LR | {"beta": 0.9}),
    "heavy_ball": Case(
        lambda learning_rate, mu: optax.chain(optax.sgd(learning_rate), heavy_ball(mu)), LR | {"mu": 0.9}, rate=1e-3
    ),
    "retention": Case(
        lambda learning_rate, alpha: optax.chain(optax.sgd(learning_rate), retention(alpha)),
        LR | {"alpha": 0.99},
        {"test_converges": "it rests between the optimum and zero"},
    ),
    "preconditioned_momentum": Case(
        partial(preconditioned_momentum, precondition=optax.scale_by_rms(eps_in_sqrt=True)), MOMENTUM, rate=1e-3
    ),
    "learned_preconditioner": Case(
        partial(preconditioned_momentum, precondition=learned_preconditioner(0.1)),
        MOMENTUM,
        {"test_a_state_is_sharded_like_its_parameter": "its memory [..., V, V] has another shape than its parameter"},
        rate=8e-4,
    ),
    "delta_momentum": Case(delta_momentum, MOMENTUM, rate=1e-3),
    "delta_momentum, exact": Case(
        partial(delta_momentum, step="exact"),
        MOMENTUM,
        {"test_a_state_is_sharded_like_its_parameter": "the solver of its step gathers the matrices"},
        rate=1e-3,
    ),
    "feature_momentum": Case(feature_momentum, MOMENTUM, rate=1e-4),
    "output_momentum": Case(output_momentum, MOMENTUM, matrices=True),
    "output_momentum, sign": Case(
        lambda learning_rate, alpha: output_momentum(learning_rate, alpha, sigma=jnp.sign),
        MOMENTUM,
        {"test_zero_gradients": "a sign has no slope"},
        rate=1e-2,
    ),
    "deep_momentum": Case(
        lambda learning_rate, alpha: deep_momentum(learning_rate, alpha),  # or static_args=("hidden", "seed")
        MOMENTUM,
        {"test_a_state_is_sharded_like_its_parameter": "its memory [V, F] has another shape than its parameter"},
        rate=1e-2,
    ),
    "generalised_momentum": Case(
        lambda learning_rate: generalised_momentum(
            optax.chain(ggd(huber(), learning_rate=learning_rate), retention(0.9)), keys="gradient"
        ),
        LR,
        rate=1e-3,
        matrices=True,
    ),
    "dgd": Case(
        dgd, LR, {"test_converges": "it also forgets along its inputs"}, matrices=True, extra=_orthonormal_inputs
    ),
}
