"""The optimizers that are compared, under one schedule, and what an equal amount of time is."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from experiments.options import Options
from experiments.training import Batch, Model, schedule, start
from hope_jax import adamuon, m3, muon_dimension_numbers
from hope_jax.training.errors import UserError
from hope_jax.training.optimizer import decay_mask
from hope_jax.training.overrides import unknown
from hope_kernels.benchmarking import time_side_by_side

type Rule = Callable[[optax.Schedule, float], optax.GradientTransformation]
B2 = 0.95  # of every Adam: of "adamw", and of the leaves that are no matrices in the others


def _adamw(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    return optax.adamw(rate, b1=0.9, b2=B2, weight_decay=decay, mask=decay_mask)


def _muon(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    return optax.contrib.muon(
        rate,
        consistent_rms=0.2,  # steps of AdamW's size, as in the others
        weight_decay=decay,
        adam_b2=B2,
        muon_weight_dimension_numbers=muon_dimension_numbers,
    )


def _adamuon(rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    return adamuon(rate, weight_decay=decay, adam_b2=B2)


def _m3(rate: optax.Schedule, decay: float, period: int = 32) -> optax.GradientTransformation:
    return m3(rate, scales=(1, period), weight_decay=decay, adam_b2=B2)


def _m3_literal(rate: optax.Schedule, decay: float, eps: float) -> optax.GradientTransformation:
    if decay:
        raise UserError(f"m3 to the letter has no weight decay; got weight_decays {decay:g}")
    return m3(rate, mode="literal", eps=eps)


RULES: dict[str, Rule] = {
    "adamw": _adamw,
    "muon": _muon,
    "adamuon": _adamuon,
    "m3": _m3,
    "m3_period_8": partial(_m3, period=8),
    "m3_period_128": partial(_m3, period=128),
    "m3_literal_eps_1e-8": partial(_m3_literal, eps=1e-8),
    "m3_literal_eps_1e-2": partial(_m3_literal, eps=1e-2),
    "m3_literal_eps_0.1": partial(_m3_literal, eps=0.1),
    "m3_literal_eps_1": partial(_m3_literal, eps=1.0),
}
BASE = "adamw"  # whose time the others get


@dataclasses.dataclass(frozen=True)
class ComparisonOptions(Options):
    """Optimizers against each other.

    Attributes:
      optimizers: names in `optimizer_comparison.RULES`.
      equal: "steps", or "time": as many steps as fit into the time that adamw needs for `steps`, by the steps of both
        timed in turns before the run.
    """

    optimizers: tuple[str, ...] = ("adamw", "muon", "adamuon", "m3")
    equal: tuple[str, ...] = ("steps",)

    GRID: ClassVar[tuple[str, ...]] = ("equal", "optimizers", *Options.GRID)

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind, names, known in (
            ("optimizer", self.optimizers, list(RULES)),
            ("equal", self.equal, ["steps", "time"]),
        ):
            for name in names:
                if name not in known:
                    raise UserError(unknown(kind, name, known))


def rule(cell: ComparisonOptions, name: str | None = None) -> optax.GradientTransformation:
    """The optimizer of a cell, or the one of this name in its place, behind the clipping all of them share."""
    [optimizer], [decay] = cell.optimizers, cell.weight_decays
    return optax.chain(optax.clip_by_global_norm(cell.clip), RULES[name or optimizer](schedule(cell), decay))


def granted[T: ComparisonOptions](
    cell: T, model: Model, batches: Iterator[Batch], loss: Callable[[jax.Array, Batch], jax.Array]
) -> T:
    """The cell with the number of steps that it gets."""
    [equal], [optimizer] = cell.equal, cell.optimizers
    if equal == "steps" or optimizer == BASE:
        return cell
    batch = next(batches)
    rules = {name: rule(cell, name) for name in (BASE, optimizer)}
    states = {name: start(model, tx, 0) for name, tx in rules.items()}

    def step(name: str) -> Callable[[Any], Any]:
        def one(states: Any) -> Any:
            params, state = states[name]
            grads = jax.grad(lambda p: loss(model.apply(p, jnp.asarray(batch.tokens)), batch))(params)
            updates, state = rules[name].update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return one

    # Processor time where it is the processor that computes: a busy machine makes it no longer.
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    timings = time_side_by_side({name: step(name) for name in rules}, states, case="", base=BASE, clock=clock)
    return dataclasses.replace(cell, steps=max(1, round(cell.steps * timings[-1].ratio)))
