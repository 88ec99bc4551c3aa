"""The optimizers that are compared, under one schedule.

Every step of a matrix has the size of AdamW's, by the rms 0.2 of its direction: exactly in AdaMuon and M3, for
directions of full rank in optax's Muon, whose remaining parameters see Nesterov's AdamW. "m3_fast_alone" is M3 without
its slow memory. "m3_literal" is the published algorithm behind the same clipping of gradients, whose size its epsilon
is to be compared with; its learning rates are on a scale of their own.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import optax

from experiments.options import Options
from experiments.training import schedule
from hope_jax import adamuon, m3, muon_dimension_numbers
from hope_jax.training.errors import UserError
from hope_jax.training.optimizer import decay_mask
from hope_jax.training.overrides import unknown

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
    del decay  # has none; the options refuse one
    return m3(rate, mode="literal", eps=eps)


RULES: dict[str, Rule] = {
    "adamw": _adamw,
    "muon": _muon,
    "adamuon": _adamuon,
    "m3": _m3,
    "m3_fast_alone": lambda rate, decay: m3(rate, scales=(1,), weight_decay=decay, adam_b2=B2),
    "m3_period_8": partial(_m3, period=8),
    "m3_period_128": partial(_m3, period=128),
    "m3_literal_eps_1e-8": partial(_m3_literal, eps=1e-8),
    "m3_literal_eps_1e-2": partial(_m3_literal, eps=1e-2),
    "m3_literal_eps_0.1": partial(_m3_literal, eps=0.1),
    "m3_literal_eps_1": partial(_m3_literal, eps=1.0),
}


@dataclasses.dataclass(frozen=True)
class ComparisonOptions(Options):
    """Optimizers against each other.

    Attributes:
      optimizers: names in `optimizer_comparison.RULES`.
    """

    optimizers: tuple[str, ...] = ("adamw", "muon", "adamuon", "m3")
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)

    GRID: ClassVar[tuple[str, ...]] = ("optimizers", *Options.GRID)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.optimizers:
            if name not in RULES:
                raise UserError(unknown("optimizer", name, list(RULES)))
            if "literal" in name and any(self.weight_decays):
                raise UserError(f"{name} has no weight decay: add --weight-decays 0; got {self.weight_decays}")


def rule(cell: ComparisonOptions) -> optax.GradientTransformation:
    """The optimizer of a cell, behind the clipping that all of them share."""
    [optimizer], [decay] = cell.optimizers, cell.weight_decays
    return optax.chain(optax.clip_by_global_norm(cell.clip), RULES[optimizer](schedule(cell), decay))
