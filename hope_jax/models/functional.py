"""A flax module as two pure functions over a plain nested dict of arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

Params = dict[str, Any]


class Functional(NamedTuple):
    """`init(key) -> params` and `apply(params, *args, method="__call__", **kwargs)` of one module."""

    init: Callable[[jax.Array], Params]
    apply: Callable[..., Any]


def functional(build: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Turn a module into pure functions over a plain nested dict of arrays.

    The module is only a container of `nnx.Param`: it must not change itself when it is called, so everything
    that transforms, shards, saves or scans parameters sees the dict and never the module.

    Args:
      build: makes the module from `nnx.Rngs`; it is traced once for its structure and once per `init`.

    Returns:
      `Functional(init, apply)`. `apply` calls the method named by `method` on the module with these params.

    Raises:
      TypeError: the module holds a variable that is not an `nnx.Param`.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> init, apply = functional(lambda rngs: nnx.Linear(2, 3, rngs=rngs))
      >>> params = init(jax.random.key(0))
      >>> sorted(params), apply(params, jax.numpy.ones((1, 2))).shape
      (['bias', 'kernel'], (1, 3))
    """
    graph, abstract = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    strangers = [path for path, leaf in nnx.to_flat_state(abstract) if not isinstance(leaf, nnx.Param)]
    if strangers:
        raise TypeError(f"only nnx.Param may live in a module; got other variables at {strangers}")

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

    def apply(params: Params, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        module = nnx.merge(graph, params)
        return getattr(module, method)(*args, **kwargs)

    return Functional(init, apply)
