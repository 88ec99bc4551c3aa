"""Choosing an implementation: one function for every operation.

A named implementation runs or raises; it is never replaced by another. Only `implementation=None` lets the
library choose, and then it takes the first of the operation's implementations, in order of preference, that can
run and suits the call. Every choice is logged at debug level by the logger "hope_kernels", and `explain` collects
the choices of a whole function.
"""

import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax

_log = logging.getLogger("hope_kernels")
_collected: ContextVar[list[str] | None] = ContextVar("collected", default=None)


def _always(*args: Any, **kwargs: Any) -> None:
    """The `cannot_run` and the `unsuited` of an implementation without conditions."""
    del args, kwargs


class Implementation(NamedTuple):
    """One way to compute an operation.

    `run(*args, **kwargs)` computes it. The other two are called with the same arguments and return a reason as one
    phrase, or None: `cannot_run` why it cannot ("needs a TPU"), `unsuited` why it is not chosen unless it is named
    ("7 tokens fill a ninth of a tile").
    """

    run: Callable[..., Any]
    cannot_run: Callable[..., str | None] = _always
    unsuited: Callable[..., str | None] = _always


def dispatch(
    operation: str,
    implementations: Mapping[str, Implementation],
    name: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run `operation` with the implementation called `name`, or with the preferred one that can run and suits.

    Args:
        operation: what the caller asked for, for the messages.
        implementations: by name, the preferred one first.
        name: a key of `implementations`, or None to let the order decide.
        *args, **kwargs: what the implementation is called with.

    Returns:
        What the implementation returns.

    Raises:
        ValueError: `name` is not the name of an implementation; the message lists those that exist.
        NotImplementedError: `name` cannot run on these arguments or this machine or, without a name, none can.
    """
    if name is not None and name not in implementations:
        raise ValueError(f"{operation} has no implementation {name!r}; there are: {', '.join(implementations)}")
    reasons = []
    for candidate in implementations if name is None else (name,):
        implementation = implementations[candidate]
        reason = implementation.cannot_run(*args, **kwargs)
        if reason is not None:
            reasons.append(f"{candidate!r} cannot run: {reason}")
            continue
        reason = implementation.unsuited(*args, **kwargs) if name is None else None
        if reason is not None:
            reasons.append(f"{candidate!r} was not chosen: {reason}")
            continue
        _report("; ".join([f"{operation}: {candidate!r} runs", *reasons]))
        return implementation.run(*args, **kwargs)
    raise NotImplementedError(
        f"{operation}: implementation {'; '.join(reasons)}; there are: {', '.join(implementations)}"
    )


def _report(line: str) -> None:
    _log.debug(line)
    collected = _collected.get()
    if collected is not None:
        collected.append(line)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Which implementation every kernel call inside `function(*args, **kwargs)` gets, and why not another.

    The function is traced, not run. Parts of it that jax has traced before are not traced again and do not show:
    pass the function without `jax.jit`.

    Args:
        function: anything that jax can trace, a single operation or a whole model.
        *args, **kwargs: its arguments; `jax.ShapeDtypeStruct` in the place of arrays will do.

    Returns:
        One line per call.

    Example:
        >>> import jax.numpy as jnp
        >>> from hope_kernels import delta_rule, explain
        >>> k = jnp.ones((1, 4, 1, 3))
        >>> print(explain(delta_rule, k, k, k).split("; ")[0])
        delta_rule: 'xla' runs
    """
    lines: list[str] = []
    token = _collected.set(lines)
    try:
        arrays, treedef = jax.tree.flatten((args, kwargs))
        is_array = [hasattr(x, "shape") and hasattr(x, "dtype") for x in arrays]

        def traced(given):
            given = iter(given)
            leaves = [next(given) if a else x for a, x in zip(is_array, arrays, strict=True)]
            args, kwargs = jax.tree.unflatten(treedef, leaves)
            return function(*args, **kwargs)

        jax.eval_shape(traced, [x for a, x in zip(is_array, arrays, strict=True) if a])
    finally:
        _collected.reset(token)
    return "\n".join(lines)


def target_device() -> Any:
    """The device that what is traced now will run on: `jax.default_device` where it is set, else the first one.

    Compiling for a machine that is not there needs `with jax.default_device(topology.devices[0])`.
    """
    device = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        return jax.devices(device)[0]
    return device
