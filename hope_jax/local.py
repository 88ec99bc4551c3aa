"""The default error function of a nest: every level remembers the same tokens, each in its own way and time."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from hope_jax.types import Level, Objective, Params, Tokens, Write
from hope_jax.writing import factored_errors


def local_error(levels: tuple[Level, ...]) -> Callable:
    """Every level remembers the same tokens, each with its own memory, objective, rule and clock."""

    def error(params_by_level: tuple[Params, ...], carry: Any, chunk: Tokens):
        errors, ys = [], []
        for lev, params in zip(levels, params_by_level, strict=True):
            key, value = heads_first(chunk.key), heads_first(chunk.value)
            _, err = factored_errors(lev.memory, cast(Objective, lev.objective), params, key, value)
            write = local_write(err, chunk)
            errors.append(write)
            reads = write.query is not None and lev.read == "start"
            ys.append(lev.memory.apply(params, write.query) if reads else None)
        return tuple(errors), carry, tuple(ys)

    return error


def local_write(error: Any, chunk: Tokens) -> Write:
    """The error of a chunk together with its gates, queries and mask, heads first."""
    gates = {name: getattr(chunk, name) for name in ("eta", "alpha", "mu", "log_alpha", "log_mu")}
    gates = {name: jnp.moveaxis(g, 0, -1) for name, g in gates.items() if g is not None}
    return Write(error, gates, None if chunk.query is None else heads_first(chunk.query), chunk.mask)


def local_output(ys: tuple, reads: tuple) -> Any:
    merged = tuple(y if r is None else r for y, r in zip(ys, reads, strict=True))
    merged = tuple(None if y is None else jnp.moveaxis(y, -2, 0) for y in merged)
    return merged[0] if len(merged) == 1 else merged


def heads_first(x: jax.Array) -> jax.Array:
    """[C, ..., K] -> [..., C, K]"""
    return jnp.moveaxis(x, 0, -2)
