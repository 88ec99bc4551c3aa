"""The delta rule on a mesh: batch entries and heads are independent, so nothing is communicated."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from hope_kernels.delta_rule.api import delta_rule
from hope_kernels.delta_rule.types import DeltaRuleOutput

_TIME = ("q", "k", "u", "eta", "log_alpha", "log_mu", "mask")  # [B, T, H, ...]
_STATE = ("initial_state", "initial_momentum")  # [B, H, K, V]


def delta_rule_sharded(
    *,
    mesh: Mesh,
    batch: str | Sequence[str] | None = None,
    heads: str | Sequence[str] | None = None,
    read: str = "after",
    scale: float = 1.0,
    precision: str = "default",
    implementation: str | None = None,
    config: Any = None,
    **arrays: jax.Array | None,
) -> DeltaRuleOutput:
    """`delta_rule` with the batch and the heads divided over axes of a mesh.

    The compiler cannot divide a Pallas kernel by itself; this wraps the call in `jax.shard_map`. Each device runs its
    own batch entries and heads on whole sequences, forward and backward, without communication.

    Args:
        mesh: the devices. On axes of explicit type the arrays must already lie as `batch` and `heads` say.
        batch: the mesh axis or axes of B; None leaves it whole.
        heads: the mesh axis or axes of H, and of Hk; None leaves them whole.
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
    present = {name: x for name, x in arrays.items() if x is not None}
    unknown = set(present) - {*_TIME, *_STATE, "segment_ids"}
    if unknown:
        raise TypeError(f"delta_rule has no array named {', '.join(sorted(unknown))}")
    _check_divisible(mesh, "batch", batch, present["k"].shape[0])
    _check_divisible(mesh, "heads", heads, present["k"].shape[2])
    time, state = PartitionSpec(batch, None, heads), PartitionSpec(batch, heads)
    specs = {n: time if n in _TIME else state if n in _STATE else PartitionSpec(batch) for n in present}

    def local(arrays: dict[str, jax.Array]) -> DeltaRuleOutput:
        arguments: dict[str, Any] = {"q": None, **arrays}
        options: dict[str, Any] = {"read": read, "precision": precision}
        return delta_rule(**arguments, **options, scale=scale, implementation=implementation, config=config)

    out_specs: Any = (time if "q" in present else None, state, state if "log_mu" in present else None)
    # Kernels do not say along which mesh axes their results vary, so that check is off.
    return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=DeltaRuleOutput(*out_specs), check_vma=False)(
        present
    )


def _check_divisible(mesh: Mesh, name: str, axes: str | Sequence[str] | None, size: int) -> None:
    parts = 1
    for axis in (axes,) if isinstance(axes, str) else axes or ():
        if axis not in mesh.shape:
            raise ValueError(f"{name}: the mesh has no axis {axis!r}; it has {', '.join(mesh.axis_names)}")
        parts *= mesh.shape[axis]
    if size % parts:
        what = "batch entries" if name == "batch" else "key heads"
        raise ValueError(f"{name}={axes!r} divides by {parts}, which does not divide the {size} {what}")
