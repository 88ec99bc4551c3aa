"""One step of the outer optimizer, without the model: M3 against Muon, AdaMuon and AdamW on the same parameters.

M3 is timed twice, at a step between two writes of its slow memory and at one that writes it; what a step costs on
average follows from the period. The parameters are those of a Transformer's hidden matrices, an embedding and norms.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hope_jax import adamuon, m3, muon_dimension_numbers
from hope_kernels.benchmarking import Timing

PERIOD = 16  # steps between two writes of M3's slow memory
BETWEEN, AT = f"m3, between slow writes (1 in {PERIOD})", "m3, at a slow write"


def transformer(size: int, width: int) -> dict[str, Any]:
    """About `size` parameters: layers stacked on the leading axis, as many as fit."""
    layers = max(1, round(size / (12 * width**2)))
    shapes = {
        "embedding": (256, width),
        "norm": {"scale": (layers, width)},
        "wqkvo": (layers, 4, width, width),
        "w_up": (layers, width, 4 * width),
        "w_down": (layers, 4 * width, width),
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=is_shape)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return treedef.unflatten([0.02 * jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)])


def rules() -> dict[str, optax.GradientTransformation]:
    """Each with the matrices of `hidden_matrices`, five quintic steps and AdamW on the rest."""
    return {
        "muon": optax.contrib.muon(1e-3, consistent_rms=0.2, muon_weight_dimension_numbers=muon_dimension_numbers),
        "m3": m3(1e-3, scales=(1, PERIOD)),
        "adamuon": adamuon(1e-3),
        "adamw": optax.adamw(1e-3),
    }


def cases(size: int, width: int) -> tuple[dict[str, Callable[[Any], Any]], Any, dict[str, float]]:
    """Steps as functions of one argument, that argument, and each rule's bytes of state per parameter."""
    params = transformer(size, width)
    count = sum(x.size for x in jax.tree.leaves(params))
    states: dict[str, Any] = {name: tx.init(params) for name, tx in rules().items()}
    per_parameter = {name: sum(x.nbytes for x in jax.tree.leaves(s)) / count for name, s in states.items()}

    def step(name: str, steps_before: int = 0) -> Callable[[Any], Any]:
        tx = optax.with_extra_args_support(rules()[name])

        def one(args: Any) -> Any:
            params, grads, states = args
            state = jax.tree.map(lambda x: x + steps_before if x.ndim == 0 else x, states[name])
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return one

    functions = {"muon": step("muon"), BETWEEN: step("m3"), AT: step("m3", PERIOD - 1)}
    functions |= {name: step(name) for name in ("adamuon", "adamw")}
    grads = jax.tree.map(lambda x: jnp.roll(x, 1), params)
    return functions, (params, grads, states), per_parameter


def amortised(timings: list[Timing]) -> tuple[float, float]:
    """Seconds of an average step of M3, and how many times Muon's that is."""
    seconds = {t.implementation: t.median for t in timings}
    average = ((PERIOD - 1) * seconds[BETWEEN] + seconds[AT]) / PERIOD
    return average, average / seconds["muon"]
