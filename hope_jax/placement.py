"""Where activations lie on a mesh: the names of its axes, and hints for the compiler.

    data, fsdp    rows of the batch
    tensor        heads and hidden widths
    sequence      tokens, between the memories; inside a memory, which reads its tokens in order, heads instead

A memory cannot be divided over its own tokens without waiting, but its heads know nothing of each other: where a layer
hands its tokens to its memories the compiler exchanges "my tokens of all heads" for "all tokens of my heads" (one
all-to-all), and back behind them. That is exact for every memory, rule and clock.

The mesh is the one in context (`jax.set_mesh`, `on_mesh`). Without one, or where an axis does not divide what it is to
divide, every hint leaves its argument alone; so does `hope_jax.pipeline`, inside which the compiler is on its own.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from hope_kernels import DeltaRuleOutput, delta_rule, delta_rule_sharded

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH = ("data", "fsdp")
HEADS = ("tensor", "sequence")


def on_mesh[F: Callable[..., Any]](function: F, mesh: Mesh) -> F:
    """`function`, traced with a mesh in context; it must be jitted with shardings on that mesh."""

    @wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced  # type: ignore[return-value]


def between_layers(x_BTD: jax.Array) -> jax.Array:
    """The residual stream: rows over the batch axes, tokens over "sequence", channels whole."""
    if _mesh() is None:
        return x_BTD
    rows, tokens = batch_axes(x_BTD.shape[0]), ("sequence",) if _divide(("sequence",), x_BTD.shape[1]) else None
    spec = P(rows or P.UNCONSTRAINED, tokens or P.UNCONSTRAINED, None)
    return jax.lax.with_sharding_constraint(x_BTD, spec)


def gathered(weight: jax.Array) -> jax.Array:
    """A table whole on every device, however it rests, for looking up rows: the compiler divides no lookup well."""
    return weight if _mesh() is None else jax.lax.with_sharding_constraint(weight, P())


def head_axes(heads: int) -> tuple[str, ...]:
    """The mesh axes that divide so many heads: as many of `HEADS` as go into them; () without a mesh."""
    return next((axes for axes in (HEADS, HEADS[:1], HEADS[1:]) if _divide(axes, heads)), ())


def batch_axes(rows: int) -> tuple[str, ...] | None:
    """The mesh axes that divide so many rows, for `jax.vmap(..., spmd_axis_name=)`; None if they do not."""
    return BATCH if _divide(BATCH, rows) else None


def placed_delta_rule(**arrays: Any) -> DeltaRuleOutput:
    """`delta_rule`, on a mesh divided by heads: the compiler cannot divide a kernel by itself."""
    mesh = _mesh()
    axes = head_axes(arrays["k"].shape[2])
    if mesh is None or not axes:
        return delta_rule(**arrays)
    return delta_rule_sharded(mesh=mesh, heads=axes, **arrays)


def _mesh() -> Any:
    """The mesh in context if it is one of ours, has several devices and leaves the placing to the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = not mesh.empty and set(AXES) <= set(mesh.axis_names) and mesh.size > 1
    return mesh if ours and all(kind == AxisType.Auto for kind in mesh.axis_types) else None


def _divide(axes: tuple[str, ...], size: int) -> bool:
    """Whether there is a mesh whose `axes` together divide `size`, be it by one."""
    mesh = _mesh()
    return mesh is not None and size % math.prod(mesh.shape[a] for a in axes) == 0


def by_head(x: jax.Array, axis: int) -> jax.Array:
    """`x` with the heads along `axis` divided over "tensor" and "sequence", every token of a head on one device."""
    mesh, axes = _mesh(), head_axes(x.shape[axis])
    if mesh is None or math.prod(mesh.shape[a] for a in axes) == 1:
        return x
    spec: list[Any] = [P.UNCONSTRAINED] * x.ndim
    spec[axis] = axes
    return jax.lax.with_sharding_constraint(x, P(*spec))
