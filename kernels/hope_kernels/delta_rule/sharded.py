"""The delta rule on a mesh: batch entries and heads are independent, and segments of time are affine maps."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from hope_kernels.delta_rule.api import delta_rule
from hope_kernels.delta_rule.config import Config
from hope_kernels.delta_rule.mesh import ARRAYS, Division, divide
from hope_kernels.delta_rule.types import DeltaRuleOutput


def delta_rule_sharded(
    *,
    mesh: Mesh,
    batch: str | Sequence[str] | None = None,
    heads: str | Sequence[str] | None = None,
    sequence: str | None = None,
    read: str = "after",
    scale: float = 1.0,
    precision: str = "default",
    implementation: str | None = None,
    config: Any = None,
    **arrays: jax.Array | None,
) -> DeltaRuleOutput:
    """`delta_rule` with the batch, the heads and the sequence divided over axes of a mesh.

    The compiler cannot divide a Pallas kernel by itself; this wraps the call in `jax.shard_map`. Each device runs its
    own batch entries and heads, forward and backward, without communication. Where the sequence is divided too, each
    runs its own tokens twice, first to find what they make of any state (`segments.py`), then from the right one;
    K (K + V) float32 numbers per head go to the other devices, whatever the length. Exact, gradients included. On mesh
    axes of type Explicit `delta_rule` divides batch and heads by itself, as the types of its arrays say.

    Args:
        mesh: the devices.
        batch: the mesh axis or axes of B; None leaves it whole.
        heads: the mesh axis or axes of H, and of Hk; None leaves them whole.
        sequence: the mesh axis of T; None leaves it whole.
        read, scale, precision, implementation, config: as in `delta_rule`.
        **arrays: the arrays of `delta_rule`, by name.

    Returns:
        As `delta_rule`, divided like the inputs.

    Raises:
        ValueError: a mesh axis that does not exist, or one that does not divide what it is to divide; else as
            `delta_rule`.
        TypeError: an array that `delta_rule` does not know.

    Example:
        >>> import jax
        >>> auto = jax.sharding.AxisType.Auto
        >>> mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(auto, auto))
        >>> x = jax.numpy.ones((2, 4, 2, 3))
        >>> delta_rule_sharded(mesh=mesh, batch="data", heads="tensor", q=x, k=x, u=x).y.shape
        (2, 4, 2, 3)
    """
    unknown = set(arrays) - ARRAYS
    if unknown:
        raise TypeError(f"delta_rule has no array named {', '.join(sorted(unknown))}")
    if sequence is not None:
        config = dataclasses.replace(config or Config(), axis=sequence)
    options: Any = dict(read=read, scale=scale, precision=precision, implementation=implementation, config=config)
    present = {name: x for name, x in arrays.items() if x is not None}
    return divide(partial(delta_rule, **options), Division(mesh, batch, heads, sequence), present)
