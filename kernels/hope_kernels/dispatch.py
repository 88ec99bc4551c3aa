"""Choosing an implementation: one function for every operation.

A named implementation runs or raises; it is never replaced by another. Only `implementation=None` lets the
library choose, and then it takes the first of the operation's implementations, in order of preference, that
can run.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


def _always(*args: Any, **kwargs: Any) -> None:
    """The `cannot_run` of an implementation without conditions."""
    del args, kwargs


class Implementation(NamedTuple):
    """One way to compute an operation.

    `run(*args, **kwargs)` computes it. `cannot_run(*args, **kwargs)`, called with the same arguments, returns
    the reason why it cannot, as one phrase ("needs a TPU"), or None.
    """

    run: Callable[..., Any]
    cannot_run: Callable[..., str | None] = _always


def dispatch(
    operation: str,
    implementations: Mapping[str, Implementation],
    name: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run `operation` with the implementation called `name`, or with the preferred one that can run.

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
        reason = implementations[candidate].cannot_run(*args, **kwargs)
        if reason is None:
            return implementations[candidate].run(*args, **kwargs)
        reasons.append(f"{candidate!r} cannot run: {reason}")
    raise NotImplementedError(
        f"{operation}: implementation {'; '.join(reasons)}; there are: {', '.join(implementations)}"
    )
