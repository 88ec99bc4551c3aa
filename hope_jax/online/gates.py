"""Surprise gates: whether a chunk of the stream is worth writing (spec 7.8, 11.1).

A gate sees each chunk's surprise, its mean loss at the weights that read it, before the chunk is written. A chunk that
is not written is read all the same: the context goes on, the clocks of the levels too, only its errors are zero.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Gate(NamedTuple):
    """A strategy, in pure functions of one stream."""

    name: str  # what `parse_gate` takes
    init: Callable[[], Any]  # -> state, a pytree of arrays
    update: Callable[[Any, jax.Array], tuple[Any, jax.Array]]  # (state, nats per token []) -> (state, write bool[])


def _one_of_each[**P](make: Callable[P, Gate]) -> Callable[P, Gate]:
    """Equal gates are one object, so that programs that use them are compiled once."""
    signature, cached = inspect.signature(make), functools.cache(make)

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> Gate:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return cached(*map(float, bound.args))  # type: ignore[call-arg]

    return made


def _stateless(name: str, write: Callable[[jax.Array], jax.Array]) -> Gate:
    return Gate(name, lambda: (), lambda state, surprise: (state, write(surprise)))


@_one_of_each
def always() -> Gate:
    """Every chunk: the upper bound of what a gate can learn, and the least work: others read each chunk once more."""
    return _stateless("always", lambda surprise: jnp.ones_like(surprise, bool))


@_one_of_each
def never() -> Gate:
    """No chunk: the lower bound, a frozen model that still carries its context."""
    return _stateless("never", lambda surprise: jnp.zeros_like(surprise, bool))


@_one_of_each
def threshold(nats: float) -> Gate:
    """Chunks whose mean loss is above `nats` per token.

    Example:
      >>> gate = threshold(2.0)
      >>> bool(gate.update(gate.init(), jnp.float32(2.5))[1])
      True
    """
    return _stateless(f"threshold:{nats!r}", lambda surprise: surprise > nats)


@_one_of_each
def ema(ratio: float = 1.0, decay: float = 0.95) -> Gate:
    """Chunks more surprising than `ratio` times the moving average of those before; the first is written.

    Args:
      ratio: of the average.
      decay: of the average, per chunk.

    Raises:
      ValueError: a decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is the share of the average that a chunk leaves, in [0, 1); got {decay}")

    def update(state: tuple[jax.Array, jax.Array], surprise: jax.Array):
        total, weight = state  # the average is total / weight, so that it has no bias at the start
        write = surprise * weight > ratio * total
        return (decay * total + (1 - decay) * surprise, decay * weight + (1 - decay)), write | (weight == 0)

    return Gate(f"ema:{ratio!r}:{decay!r}", lambda: (jnp.zeros(()), jnp.zeros(())), update)


@_one_of_each
def budget(share: float, rate: float = 0.1) -> Gate:
    """The most surprising chunks, and never more than `share` of those read so far, rounded up.

    The bar starts at the first chunk and follows the (1 - share) quantile of the surprise: it rises by `rate`
    (1 - share) nats with a chunk above it and falls by `rate` `share` with one below.

    Raises:
      ValueError: a share outside [0, 1].

    Example:
      >>> gate, written = budget(0.5), []
      >>> state = gate.init()
      >>> for surprise in (3.0, 3.0, 1.0, 3.0):
      ...     state, write = gate.update(state, jnp.float32(surprise))
      ...     written.append(bool(write))
      >>> written
      [True, False, False, True]
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is the part of the chunks that may be written, in [0, 1]; got {share}")

    def update(state: tuple[jax.Array, jax.Array, jax.Array], surprise: jax.Array):
        read, written, bar = state
        bar = jnp.where(read == 0, surprise, bar)
        above = surprise >= bar
        write = above & (written < jnp.ceil(share * (read + 1.0)))
        return (read + 1, written + write, bar + rate * (above - share)), write

    return Gate(f"budget:{share!r}:{rate!r}", lambda: (jnp.int32(0), jnp.int32(0), jnp.zeros(())), update)


GATES: dict[str, Callable[..., Gate]] = {
    "always": always,
    "never": never,
    "threshold": threshold,
    "ema": ema,
    "budget": budget,
}


def parse_gate(text: str) -> Gate:
    """A gate from its name and numbers, as on a command line: "always", "threshold:2.5", "ema:1.1:0.9", "budget:0.25".

    Raises:
      ValueError: no such gate, or not its numbers.

    Example:
      >>> parse_gate("budget:0.25").name
      'budget:0.25:0.1'
    """
    name, *numbers = text.split(":")
    if name not in GATES:
        raise ValueError(f"no gate {name!r}; there are {', '.join(GATES)}, with numbers after colons: budget:0.25")
    try:
        return GATES[name](*map(float, numbers))
    except (TypeError, ValueError) as error:
        raise ValueError(f"gate {text!r}: {error}") from error
