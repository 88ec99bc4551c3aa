"""Miras (arXiv:2504.13173): a memory whose weights are a function of what is written, its link.

Retention other than a pull to zero is mirror descent. Writes and decays act linearly on the dual A, as everywhere else,
and what remembers is W = link(A):

    A_t = alpha_t A_{t-1} - eta_t grad l(W)        W at the start of the chunk, for its errors and reads

    retention        link
    l2               identity
    KL               softmax      W_t ~ W_{t-1}^alpha exp(-eta grad), the weights are distributions
    Lq               lq(q)        A / ||A||_q^(q-2)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hope_jax.levels import level
from hope_jax.local import heads_first, local_write
from hope_jax.nesting import nest
from hope_jax.objectives import huber_norm, l2_regression, lp_regression
from hope_jax.transforms import dgd
from hope_jax.types import Memory, Nest, Objective, Params, Tokens
from hope_jax.writing import factored_errors

type Link = Callable[[jax.Array], jax.Array]  # A[..., K, V] -> W[..., K, V]


def identity(dual: jax.Array) -> jax.Array:
    """W = A: l2 retention."""
    return dual


def softmax(dual: jax.Array) -> jax.Array:
    """W = softmax(A) over the inputs, so that every output averages its inputs: KL retention."""
    return jax.nn.softmax(dual, axis=-2)


def lq(q: float) -> Link:
    """W = A / ||A||_q^(q-2), the norm over a whole matrix: Lq retention as published.

    The power of the norm alone makes the link one of degree 3 - q: for q > 3 weights grow while their dual decays. An
    all-zero dual stays zero.

    Args:
        q: exponent, at least 2; 2 is the identity.

    Raises:
        ValueError: q below 2.

    Example:
        >>> lq(4.0)(jnp.array([[2.0], [0.0]])).tolist()
        [[0.5], [0.0]]

    Reference: arXiv:2504.13173, Moneta.
    """
    if q < 2:
        raise ValueError(f"lq needs q >= 2; got {q}")

    def link(dual: jax.Array) -> jax.Array:
        power = jnp.sum(jnp.abs(dual) ** q, axis=(-2, -1), keepdims=True)
        return dual / jnp.where(power > 0, power, 1) ** ((q - 2) / q)

    return link


def miras(memory: Memory, chunk_size: int, *, objective: Objective = l2_regression, link: Link = identity) -> Nest:
    """Gradient descent with retention on the dual of a memory's weights. Gates: eta, alpha.

    Errors and reads are taken with the linked weights at the chunk's start.

    Args:
        memory: a matrix or an MLP; its `init` gives the dual.
        chunk_size: C, tokens per gradient point.
        objective: what remembering means.
        link: dual -> weights, of each matrix: `identity`, `softmax` or `lq(q)`.

    Returns:
        A nest over `Tokens`; the level's weights are the dual.

    Example:
        >>> from hope_jax import Tokens, mlp_memory
        >>> n, x, g = miras(mlp_memory(4, 8), 2, link=softmax), jnp.ones((6, 4)), jnp.full(6, 0.5)
        >>> n.apply(n.init(n.params(jax.random.key(0))), Tokens(x, x, x, eta=g, alpha=g))[1].shape
        (6, 4)

    Reference: arXiv:2504.13173.
    """
    lev = level(memory, dgd(exact=False, decay=False), chunk_size, objective=objective)

    def error(params_by_level: tuple[Params, ...], carry: Any, chunk: Tokens):
        weights = jax.tree.map(link, params_by_level[0])
        _, err = factored_errors(memory, objective, weights, heads_first(chunk.key), heads_first(chunk.value))
        write = local_write(err, chunk)
        y = None if write.query is None else jnp.moveaxis(memory.apply(weights, write.query), -2, 0)
        return (write._replace(query=None),), carry, y

    return nest(lev, error=error)


def moneta(memory: Memory, chunk_size: int, p: float = 3.0, q: float = 4.0) -> Nest:
    """Miras with the Lp objective and Lq retention. Gates: eta, alpha.

    Example:
        >>> from hope_jax import linear_memory
        >>> n = moneta(linear_memory(4, 4, init_scale=1.0), chunk_size=2)

    Reference: arXiv:2504.13173.
    """
    return miras(memory, chunk_size, objective=lp_regression(p), link=lq(q))


def yaad(memory: Memory, chunk_size: int, c: float = 1.0) -> Nest:
    """Miras with the Huber objective, of the error's norm, and l2 retention. Gates: eta, alpha.

    Example:
        >>> from hope_jax import linear_memory
        >>> n = yaad(linear_memory(4, 4), chunk_size=2)

    Reference: arXiv:2504.13173, which makes the threshold c from the token; here it is a constant.
    """
    return miras(memory, chunk_size, objective=huber_norm(c))


def memora(memory: Memory, chunk_size: int) -> Nest:
    """Miras with the L2 objective and KL retention. Gates: eta, alpha.

    Example:
        >>> from hope_jax import linear_memory
        >>> n = memora(linear_memory(4, 4), chunk_size=2)

    Reference: arXiv:2504.13173.
    """
    return miras(memory, chunk_size, link=softmax)
