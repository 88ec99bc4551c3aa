"""Factored gradients: the `Outer` factors of every weight in one backward pass (spec 2.3, 3.4).

A zero `tap` is added to each product, y = x @ w + tap. Its gradient is the error at the weight's output and x is the
weight's key, so the gradient with respect to the taps gives all factors and no dense gradient is ever built.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hope_jax.types import Linear, Outer, Params


def factored_vjp(
    forward: Callable[[Params, Linear], tuple[Any, Any]], params: Params
) -> tuple[Any, Callable[[Any], Any], Any]:
    """`jax.vjp` with respect to weights, factored.

    Args:
        forward: `forward(refs, linear) -> (out, aux)`, where refs is a tree like `params` and each weight is used
            exactly once, by `linear(x[..., C, K], ref) -> [..., C, V]`; pass it on as `Memory.apply`'s `linear`.
        params: weights, a tree of [..., K, V].

    Returns:
        out, a function from out's cotangent to a tree like `params` with `Outer` leaves, and aux.

    Raises:
        ValueError: a weight that is used twice or not through `linear`.

    Example:
        >>> import jax.numpy as jnp
        >>> from hope_jax import contract
        >>> w, x = {"w": jnp.ones((2, 1))}, jnp.ones((3, 2))
        >>> out, backward, _ = factored_vjp(lambda refs, linear: (linear(x, refs["w"]).sum(), None), w)
        >>> contract(backward(1.0)["w"]).tolist()
        [[3.0], [3.0]]
    """
    leaves, treedef = jax.tree.flatten(params)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    refs = treedef.unflatten(range(len(leaves)))
    products = {}

    def measure(x: jax.Array, i: int) -> jax.Array:
        if i in products:
            raise ValueError(f"weight {names[i]} is used twice; a factored gradient needs one product per weight")
        products[i] = x @ leaves[i]
        return products[i]

    jax.eval_shape(lambda: forward(refs, measure))
    unused = [name for i, name in enumerate(names) if i not in products]
    if unused:
        raise ValueError(f"weights {', '.join(unused)} must each be used through linear(x, weight); they were not")

    def tapped(taps: list[jax.Array]) -> tuple[Any, tuple[Any, dict[int, jax.Array]]]:
        keys = {}

        def linear(x: jax.Array, i: int) -> jax.Array:
            keys[i] = x
            return x @ leaves[i] + taps[i]

        out, aux = forward(refs, linear)
        return out, (aux, keys)

    taps = [jnp.zeros(products[i].shape, products[i].dtype) for i in range(len(leaves))]
    out, backward, (aux, keys) = jax.vjp(tapped, taps, has_aux=True)

    def factors(cotangent: Any) -> Any:
        (deltas,) = backward(cotangent)
        return treedef.unflatten([Outer(delta, keys[i]) for i, delta in enumerate(deltas)])

    return out, factors, aux
