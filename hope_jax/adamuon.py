"""AdaMuon: Muon on the signs of the momentum, with a second moment of what Newton-Schulz makes of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hope_jax.matrix_parameters import Labels, check_matrices, matrices_and_adamw
from hope_jax.newton_schulz import check_newton_schulz, newton_schulz
from hope_jax.numerics import safe_sqrt, with_rms
from hope_jax.types import Params

RMS = 0.2  # of a step at learning rate 1


class ScaleByAdaMuonState(NamedTuple):
    momentum: Params  # M, like the parameters
    square: Params  # V, like the parameters


def scale_by_adamuon(
    beta: Any = 0.95, eps: Any = 1e-8, ns: tuple[str, int] = ("quintic", 5), b2: Any = None
) -> optax.GradientTransformationExtraArgs:
    """The direction of AdaMuon, for trees of matrices; `adamuon` is the optimizer and says what the arguments are.

    Raises:
        ValueError: as `adamuon`; a leaf of less than two axes.

    Example:
        >>> tx, w = scale_by_adamuon(), jnp.zeros((2, 2))
        >>> u, state = tx.update(jnp.eye(2), tx.init(w))
        >>> print(f"{jnp.sqrt(jnp.mean(u**2)):.3f}")
        0.200

    Reference: arXiv:2507.11005, Algorithm 1.
    """
    kind, steps = ns
    check_newton_schulz(steps, kind)
    for name, value in (("beta", beta), ("b2", b2)):
        if isinstance(value, (int, float)) and not 0 <= value < 1:
            raise ValueError(f"adamuon's {name} must lie in [0, 1); got {value}")
    decay = beta if b2 is None else b2

    def init(params: Params) -> Any:
        check_matrices(params, "adamuon")
        return ScaleByAdaMuonState(*(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

    def update(updates: Any, state: Any, params: Params = None, **extra: Any):
        del params, extra
        like = lambda x, old: x.astype(old.dtype)  # noqa: E731
        momentum = jax.tree.map(lambda m, g: like(beta * m + g, m), state.momentum, updates)
        direction = jax.tree.map(lambda m: newton_schulz(jnp.sign(m), steps, kind), momentum)
        square = jax.tree.map(lambda v, o: like(decay * v + (1 - decay) * o * o, v), state.square, direction)
        scaled = jax.tree.map(lambda o, v: with_rms(o / (safe_sqrt(v) + eps), RMS, 0), direction, square)
        return jax.tree.map(like, scaled, updates), ScaleByAdaMuonState(momentum, square)

    return optax.GradientTransformationExtraArgs(init, update)


def adamuon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta: Any = 0.95,
    b2: Any = None,
    eps: Any = 1e-8,
    ns: tuple[str, int] = ("quintic", 5),
    weight_decay: Any = 0.0,
    labels: Labels | None = None,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: Any = 0.9,
    adam_b2: Any = 0.999,
    adam_weight_decay: Any = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """AdaMuon as published: Newton-Schulz of the momentum's signs, divided by its own second moment, at rms 0.2.

    For a matrix [m, n] with gradient G, from M = V = 0:

        M <- beta M + G
        O = NS(sign(M))
        V <- beta V + (1 - beta) O^2                      element-wise, without bias correction
        O' = O / (sqrt(V) + eps)
        W <- W - learning_rate (0.2 sqrt(m n) O' / ||O'|| + weight_decay W)

    Every line is Algorithm 1 of the paper's third version (the norm is Frobenius', so the step has rms 0.2, and the
    missing bias correction cancels). Ours: `b2` in the place of the second beta, which the first version of the paper's
    code had (0.999, with Nesterov's momentum and without the sign); leading axes are independent matrices; which
    parameters are matrices, and AdamW on the others.

    Args:
        learning_rate: a number or a schedule, of the size that AdamW takes.
        beta: decay of both moments.
        b2: decay of the second moment; None: beta.
        eps: added to the root of V.
        ns: kind and number of steps of `newton_schulz`.
        weight_decay: decoupled, of the matrices.
        labels: as in `m3`: a tree of "matrix" and "other", or a function; None: `hidden_matrices`.
        adam_learning_rate, adam_b1, adam_b2, adam_weight_decay: of AdamW on the other leaves.

    Returns:
        A transformation that needs `params` in `update`.

    Raises:
        ValueError: a decay outside [0, 1), labels that match nothing, a leaf of less than two axes labelled "matrix".

    Example:
        >>> w = {"wq": jnp.ones((4, 4)), "bias": jnp.ones(4)}
        >>> tx = adamuon(0.1)
        >>> updates, state = tx.update(w, tx.init(w), w)
        >>> print(f"{jnp.sqrt(jnp.mean(updates['wq'] ** 2)):.3f}")  # 0.2 times the learning rate
        0.020

    Reference: Si, Zhang, Shen 2025, arXiv:2507.11005v3, Algorithm 1.
    """
    return matrices_and_adamw(
        scale_by_adamuon(beta, eps, ns, b2),
        learning_rate,
        weight_decay=weight_decay,
        labels=labels,
        adam_learning_rate=adam_learning_rate,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_eps=1e-8,
        adam_weight_decay=adam_weight_decay,
    )
