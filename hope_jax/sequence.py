"""Known sequence models as named nests: each is one level, and the table of `hope_jax` is proven on them.

All take and return what `nest` does, for one head of one example: xs is `Tokens` with key and query [T, K],
value [T, V] and the gates named in each docstring [T]; ys [T, V]. With `dgd` on the dot product the error is -v
whatever the weights, so for those models the chunk size changes nothing but speed.
"""

from typing import Literal

import optax

from hope_jax.memories import linear_memory
from hope_jax.nesting import level, nest
from hope_jax.objectives import dot_product, l2_regression
from hope_jax.transforms import dgd, retention
from hope_jax.types import Nest


def linear_attention(key_width: int, value_width: int, chunk_size: int = 64) -> Nest:
    """Hebbian linear attention, S_t = S_{t-1} + k_t v_t^T, y_t = q_t S_t (paper (15), (64)).

    Gradient descent with step 1 on the dot-product objective.
    """
    return _nest(key_width, value_width, optax.sgd(1.0), chunk_size, dot_product)


def retnet(key_width: int, value_width: int, alpha: float, chunk_size: int = 64) -> Nest:
    """Linear attention with constant decay, S_t = alpha S_{t-1} + k_t v_t^T (arXiv:2307.08621)."""
    return _nest(key_width, value_width, optax.chain(optax.sgd(1.0), retention(alpha)), chunk_size, dot_product)


def gated_linear_attention(key_width: int, value_width: int, chunk_size: int = 64) -> Nest:
    """Decay and step from the data, S_t = alpha_t S_{t-1} + eta_t k_t v_t^T, as in Mamba-2; gates alpha, eta.

    Reference: arXiv:2405.21060.
    """
    return _nest(key_width, value_width, dgd(exact=False, decay=False), chunk_size, dot_product)


def delta_net(key_width: int, value_width: int, chunk_size: int = 64) -> Nest:
    """DeltaNet, S_t = (I - eta_t k_t k_t^T) S_{t-1} + eta_t k_t v_t^T; gate eta (paper (65), arXiv:2406.06484)."""
    return _nest(key_width, value_width, dgd(exact=False), chunk_size, dot_product)


def gated_delta_net(key_width: int, value_width: int, chunk_size: int = 64) -> Nest:
    """Gated DeltaNet, S_t = alpha_t (I - eta_t k_t k_t^T) S_{t-1} + eta_t k_t v_t^T; gates alpha, eta.

    Reference: arXiv:2412.06464.
    """
    return _nest(key_width, value_width, dgd(exact=False, decayed_erase=True), chunk_size, dot_product)


def longhorn(key_width: int, value_width: int, chunk_size: int = 64) -> Nest:
    """Longhorn, DeltaNet with the exact step eta' = eta / (1 + eta ||k||^2); gate eta (arXiv:2407.14207)."""
    return _nest(key_width, value_width, dgd(), chunk_size, dot_product)


def dgd_attention(key_width: int, value_width: int, chunk_size: int) -> Nest:
    """DGD on L2 with errors and reads at the chunk start; gates alpha, eta (paper (93))."""
    return _nest(key_width, value_width, dgd(), chunk_size, l2_regression, read="start")


def ttt_linear(key_width: int, value_width: int, chunk_size: int) -> Nest:
    """TTT-Linear: gradient descent on L2 with errors at the chunk start, running reads; gate eta (arXiv:2407.04620)."""
    return _nest(key_width, value_width, dgd(exact=False, decay=False), chunk_size, l2_regression)


def _nest(
    key_width: int, value_width: int, tx, chunk_size: int, objective, read: Literal["start", "after"] = "after"
) -> Nest:
    return nest(level(linear_memory(key_width, value_width), tx, chunk_size, objective=objective, read=read))
