"""Nested levels: every level starts again when the next slower one writes, and its start learns too (spec 6.5).

The start state of a level is a memory like any other, so it is a level: one with the clock and the rule of the next
slower level, written with the errors of the level that starts from it, which it restarts (`restarts` of `level`).
"""

import itertools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from hope_jax.nesting import nest
from hope_jax.types import Level, Nest, NestState, Params

type Meta = Literal["first_order", "outer"]


def nest_with_starts(*levels: Level, error: Callable, meta: Meta = "first_order", remat: bool = False) -> Nest:
    """A nest of global levels, each set back to its start state whenever the next slower one has written.

    At a shared boundary all levels write, then the faster ones start again. With the rule tx of level l + 1,

        start_l <- start_l + tx(sum of grad_t at the weights of level l of the moment, t in the chunk of level l + 1)

    which is the meta-gradient of first order, with d theta_l / d start_l = 1.

    Args:
        levels: L levels, fastest first.
        error: as in `nest`, for L levels.
        meta: "first_order" moves the start states in context, as above; "outer" leaves that to who differentiates.
        remat: as in `nest`.

    Returns:
        A nest whose `params` and `init` take L trees. `state.levels` has 2 L - 1: each level but the slowest is
        followed by its start state.

    Raises:
        ValueError: an unknown meta, and as in `nest`.

    Example:
        >>> import jax, optax
        >>> from hope_jax import level, linear_memory
        >>> def error(params, carry, x):
        ...     return jax.grad(lambda ps: sum(jnp.sum((x @ p["w"] - x) ** 2) for p in ps))(params), carry, x
        >>> fast, slow = (level(linear_memory(2, 2), optax.sgd(0.1 / c), c) for c in (1, 4))
        >>> n = nest_with_starts(fast, slow, error=error)
        >>> state, _ = n.apply(n.init(n.params(jax.random.key(0))), jnp.ones((8, 2)))
        >>> fast, start, slow = (one.start["w"] for one in state.levels)
        >>> bool((fast == start).all())
        True

    Reference: paper (72); spec 6.5.
    """
    if meta not in get_args(Meta.__value__):
        raise ValueError(f"meta must be one of {', '.join(get_args(Meta.__value__))}; got {meta!r}")
    plain = nest(*levels, error=error)

    def with_starts(params_by_level: tuple[Params, ...], carry: Any, chunk: Any):
        errors, carry, ys = error(params_by_level[::2], carry, chunk)
        of_starts = errors if meta == "first_order" else jax.tree.map(jnp.zeros_like, params_by_level[::2])
        return _between(errors, of_starts), carry, ys

    starts = tuple(_start(fast, slow, meta) for fast, slow in itertools.pairwise(levels))
    whole = nest(*_between(levels, starts), error=with_starts, remat=remat)

    def init(params_by_level: tuple[Params, ...], carry: Any = None) -> NestState:
        plain.init(params_by_level)  # refuses another number of levels in the caller's terms
        return whole.init(_between(params_by_level, params_by_level), carry)

    return Nest(plain.params, init, whole.apply)


def _start(fast: Level, slow: Level, meta: Meta) -> Level:
    """The level that holds the start state of `fast`."""
    start = slow._replace(memory=fast.memory, restarts=True)
    return start if meta == "first_order" else start._replace(tx=optax.set_to_zero(), bptt_chunks=None)


def _between(levels: Any, starts: Any) -> tuple:
    """Each level but the last, followed by its start: (l_0, s_0, l_1, s_1, ..., l_last)."""
    return (*(x for pair in zip(levels[:-1], starts, strict=False) for x in pair), levels[-1])
