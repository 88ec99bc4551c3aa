"""M3, Multi-scale Momentum Muon: momenta of several clocks, each through Newton-Schulz, added up (Algorithm 1, (75)).

Every scale is a level whose data are gradients. The first is written at every step; a slower one gathers the
gradients of its period, is written once with them, and what Newton-Schulz makes of it is added from the next step on
until its next write.
"""

from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hope_jax.matrix_parameters import (
    MATRIX,
    OTHER,
    Labels,
    by_matrix,
    check_matrices,
    matrices_and_adamw,
)
from hope_jax.newton_schulz import check_newton_schulz, newton_schulz
from hope_jax.numerics import safe_sqrt, with_rms, zeros_wide
from hope_jax.types import Params

RHO = 0.2  # rms of a step at learning rate 1, as AdamW's usually is


class SlowScale(NamedTuple):
    """A momentum of one slow clock; trees like the parameters, in their dtypes, the sum in float32 or wider."""

    momentum: Params  # M_i
    pending: Params  # a_i: sum of the gradients since its last write
    direction: Params  # O_i: Newton-Schulz of M_i as it was last written


class ScaleByM3State(NamedTuple):
    count: jax.Array  # int32[]: steps so far; a slow scale is written when it becomes a multiple of its period
    momentum: Params  # M_1, like the parameters
    square: Params | None  # V, like the parameters in float32 or wider; None in mode "ema" without divide
    slow: tuple[SlowScale, ...]


def scale_by_m3(
    *,
    mode: str = "ema",
    scales: Sequence[int] = (1, 32),
    b1: Any = 0.95,
    b2: Any = 0.999,
    b3: Any = 0.9,
    slow_weight: Any = 0.25,
    eps: Any = None,
    divide: bool = False,
    ns: tuple[str, int] | None = ("quintic", 5),
) -> optax.GradientTransformationExtraArgs:
    """The direction of M3, for trees of matrices; `m3` is the optimizer.

    Args: those of `m3`; `ns=None` leaves momenta as they are, and then leaves may have any shape.

    Raises:
        ValueError: as `m3`; a leaf of less than two axes unless ns is None.

    Example:
        >>> tx, w = scale_by_m3(), jnp.zeros((2, 2))
        >>> u, state = tx.update(jnp.eye(2), tx.init(w))
        >>> print(f"{jnp.sqrt(jnp.mean(u**2)):.3f}")
        0.200

    Reference: paper Algorithm 1, (75); spec 4.8.
    """
    periods, literal = _checked_scales(scales), _is_literal(mode)
    if divide and literal:
        raise ValueError('divide=True belongs to mode="ema"; mode="literal" always divides')
    if eps is None:
        eps = 0.1 if literal else 1e-8
    betas, weights = (_per_scale(n, v, len(periods)) for n, v in (("b3", b3), ("slow_weight", slow_weight)))
    decays: list[tuple[str, float]] = [("b1", b1), ("b2", b2), *(("b3", b) for b in betas)]
    for name, beta in decays:
        if not literal and isinstance(beta, Real) and not 0 <= beta < 1:
            raise ValueError(f'm3\'s {name} is a decay in [0, 1) in mode="ema"; got {beta}')
    if ns is not None:
        kind, steps = ns
        check_newton_schulz(steps, kind)
    orthogonal = (lambda x: x) if ns is None else lambda x: newton_schulz(x, steps, kind)

    def write(memory: jax.Array, x: jax.Array, b: Any) -> jax.Array:
        new = memory + b * x if literal else b * memory + (1 - b) * x
        return new.astype(memory.dtype)

    def init(params: Params) -> Any:
        if ns is not None:
            check_matrices(params, "m3")
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
        sums = lambda: jax.tree.map(zeros_wide, params)  # noqa: E731
        slow = tuple(SlowScale(zeros(), sums(), zeros()) for _ in periods)
        return ScaleByM3State(jnp.zeros((), jnp.int32), zeros(), sums() if literal or divide else None, slow)

    def advance(scale: SlowScale, updates: Any, due: jax.Array, period: int, b: Any) -> SlowScale:
        """Gathers the gradient, and at the boundary writes what has been gathered."""
        pending = jax.tree.map(lambda a, g: (a + g).astype(a.dtype), scale.pending, updates)

        def boundary() -> SlowScale:
            share = 1 if literal else 1 / period
            momentum = jax.tree.map(lambda m, a: write(m, a * share, b), scale.momentum, pending)
            return SlowScale(momentum, jax.tree.map(jnp.zeros_like, pending), jax.tree.map(orthogonal, momentum))

        return jax.lax.cond(due, boundary, lambda: scale._replace(pending=pending))

    def update(updates: Any, state: Any, params: Params = None, **extra: Any) -> tuple[Any, Any]:
        del params, extra
        count = jnp.asarray(optax.safe_increment(state.count))
        momentum = jax.tree.map(lambda m, g: write(m, g, b1), state.momentum, updates)
        square = state.square
        if square is not None:
            square = jax.tree.map(lambda v, g: write(v, g * g, b2), square, updates)
        direction = jax.tree.map(orthogonal, momentum)
        for weight, scale in zip(weights, state.slow, strict=True):
            direction = jax.tree.map(lambda d, o, w=weight: d + w * o, direction, scale.direction)
        if square is not None:
            unbiased = 1 if literal else 1 / (1 - b2**count)
            direction = jax.tree.map(lambda d, v: d / (safe_sqrt(v * unbiased) + eps), direction, square)
        if not literal:
            direction = jax.tree.map(lambda d: with_rms(d, RHO, eps), direction)
        slow = tuple(
            advance(scale, updates, count % period == 0, period, b)
            for scale, period, b in zip(state.slow, periods, betas, strict=True)
        )
        direction = jax.tree.map(lambda d, g: d.astype(g.dtype), direction, updates)
        return direction, ScaleByM3State(count, momentum, square, slow)

    return optax.GradientTransformationExtraArgs(init, update)


def m3(
    learning_rate: optax.ScalarOrSchedule,
    *,
    mode: str = "ema",
    scales: Sequence[int] = (1, 32),
    b1: Any = 0.95,
    b2: Any = 0.999,
    b3: Any = 0.9,
    slow_weight: Any = 0.25,
    eps: Any = None,
    divide: bool = False,
    ns: tuple[str, int] = ("quintic", 5),
    weight_decay: Any = 0.0,
    labels: Labels | None = None,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: Any = 0.9,
    adam_b2: Any = 0.999,
    adam_weight_decay: Any = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Multi-scale Momentum Muon: a fast and a slow momentum, each orthogonalised, added up.

    With gradient g, f the slow period, M_1, M_2, V, O_2 and the sum a of gradients all zero at the start, step t is

        M_1 <- write(M_1, g);  V <- write(V, g^2);  a <- a + g
        D = NS(M_1) + slow_weight O_2
        parameters <- parameters - learning_rate (step(D, V) + weight_decay parameters)
        if f divides t:  M_2 <- write(M_2, a);  O_2 = NS(M_2);  a = 0

    so gradients 1 to f first act through the slow memory at step f + 1, and its Newton-Schulz runs once in f steps
    (`lax.cond`; under `vmap` a select that computes it at every step). The two modes differ in

        mode          "ema"                                         "literal"
        write M_1     b1 M_1 + (1 - b1) g                           M_1 + b1 g
        write M_2     b3 M_2 + (1 - b3) a / f                       M_2 + b3 a
        step          0.2 D / (rms(D) + eps) for each matrix        D / (sqrt(V) + eps)
        V             only with divide: an unbiased average         V + b2 g^2
        matrices      `hidden_matrices`                             every leaf of two or more axes
        other leaves  AdamW                                         the same with NS = identity
        weight decay  decoupled, of the matrices                    none

    "literal" is the published algorithm to the letter. Its epsilon is not published and decides everything: with a tiny
    one a step is inversely proportional to the size of the gradients. A small classifier trained at no learning rate
    with 1e-8, and at the right one with 1e-3 to 1; sweep it. Nothing decays there, b1 and b3 do not reach the matrices
    (Newton-Schulz ignores scale), and b2 only rescales their learning rate.

    Args:
        learning_rate: a number or a schedule; in "ema" of the size that AdamW takes.
        mode: "ema" or "literal".
        scales: periods of the momenta in steps, the first 1, then growing. Two are M3, (1,) is Muon with steps of equal
            rms, (1, 10, 100) has two slow memories.
        b1: of M_1; b2: of V; b3: of the slow memories, one number or one for each.
        slow_weight: what a slow memory weighs in D, one number or one for each.
        eps: None: 1e-8 in "ema", where it is AdamW's too, 0.1 in "literal".
        divide: in "ema", divide D by sqrt(V) + eps before its rms is set.
        ns: kind and number of steps of `newton_schulz`.
        weight_decay: in "ema", of the matrices.
        labels: a tree of "matrix" and "other" like the parameters, or a function that makes it from them. Leading axes
            of a matrix are independent matrices.
        adam_learning_rate, adam_b1, adam_b2, adam_weight_decay: of AdamW on the other leaves in "ema"; its learning
            rate is `learning_rate` if None.

    Returns:
        A transformation that needs `params` in `update`. With `optax.inject_hyperparams` every number may be injected;
        labels that are a function then need `static_args="labels"`.

    Raises:
        ValueError: an unknown mode, scales that do not grow from 1, numbers for another count of scales, in "ema" a
            decay b1, b2, b3 outside [0, 1), labels that match nothing, a leaf of less than two axes labelled "matrix",
            weight decay in mode "literal".

    Example:
        >>> w = {"wq": jnp.ones((4, 4)), "bias": jnp.ones(4)}
        >>> tx = m3(0.1)
        >>> updates, state = tx.update(w, tx.init(w), w)
        >>> print(f"{jnp.sqrt(jnp.mean(updates['wq'] ** 2)):.3f}")  # 0.2 times the learning rate
        0.020

    Reference: paper Algorithm 1, (75); spec 4.8, 9.24-9.30.
    """
    options: dict[str, Any] = dict(mode=mode, scales=scales, b1=b1, b2=b2, b3=b3, slow_weight=slow_weight, eps=eps)
    matrix = scale_by_m3(**options, divide=divide, ns=ns)
    if _is_literal(mode):
        for name, value in (("weight_decay", weight_decay), ("adam_weight_decay", adam_weight_decay)):
            if isinstance(value, Real) and value:
                raise ValueError(f'mode="literal" has no weight decay; got {name}={value}: use mode="ema"')
        parts = by_matrix(matrix, scale_by_m3(**options, ns=None), labels, default=_two_or_more_axes)
        return optax.chain(parts, optax.scale_by_learning_rate(learning_rate))
    return matrices_and_adamw(
        matrix,
        learning_rate,
        weight_decay=weight_decay,
        labels=labels,
        adam_learning_rate=adam_learning_rate,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_eps=1e-8 if eps is None else eps,
        adam_weight_decay=adam_weight_decay,
    )


def _two_or_more_axes(params: Params) -> Any:
    return jax.tree.map(lambda x: MATRIX if x.ndim > 1 else OTHER, params)


def _is_literal(mode: str) -> bool:
    if mode not in ("ema", "literal"):
        raise ValueError(f'm3 has the modes "ema" and "literal"; got mode={mode!r}')
    return mode == "literal"


def _checked_scales(scales: Sequence[int]) -> tuple[int, ...]:
    """The slow periods."""
    periods = tuple(scales)
    whole = all(isinstance(p, Integral) for p in periods)
    if not whole or periods[:1] != (1,) or any(a >= b for a, b in pairwise(periods)):
        raise ValueError(f"scales are periods in steps, 1 first, then growing, such as (1, 32); got {scales!r}")
    return periods[1:]


def _per_scale(name: str, value: Any, n: int) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * n
    if len(values) != n:
        raise ValueError(f"{name} is one number or one for each of the {n} slow scales; got {value!r}")
    return values
