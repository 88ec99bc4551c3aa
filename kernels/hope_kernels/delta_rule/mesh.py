"""A call on a mesh: whether the compiler divides it, whether the types of its arrays do, and dividing it by hand.

The compiler divides plain jax over mesh axes of type Auto by itself, and cannot divide a Pallas kernel. Inside
`jax.shard_map` there is nothing left to divide, so kernels run there. On axes of type Explicit the types of the arrays
say how they lie, and the call is wrapped in `jax.shard_map` accordingly.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hope_kernels.delta_rule.types import DeltaRuleOutput

_TIME = {"q", "k", "u", "eta", "log_alpha", "log_mu", "mask"}  # [B, T, H, ...]
_STATE = {"initial_state", "initial_momentum"}  # [B, H, K, V]
ARRAYS = _TIME | _STATE | {"segment_ids"}  # the last [B, T]; those of `delta_rule`, by name

type Axes = str | Sequence[str] | None


class Division(NamedTuple):
    """Which axes of a mesh divide the batch entries, the heads and the tokens of a call."""

    mesh: Any  # Mesh or AbstractMesh
    batch: Axes
    heads: Axes
    sequence: str | None = None


def undividable(arrays: Any) -> str | None:
    """Why a kernel cannot run on these arrays, as one phrase: the compiler would have to divide it. Or None.

    The mesh is the one in context (`jax.set_mesh`, `jax.shard_map`), else the one on which the arrays lie.
    """
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays))]
    mesh = next((mesh for mesh in meshes if not mesh.empty), None)
    if mesh is None or set(mesh.manual_axes) == set(mesh.axis_names) or mesh.size == 1:
        return None
    left = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if name not in mesh.manual_axes)
    return f"the compiler cannot divide a kernel over a mesh ({left}); delta_rule_sharded divides it"


def division_by_type(arrays: dict[str, jax.Array]) -> Division | None:
    """How the types of the arrays divide the call, by those of `u`; None if they do not."""
    types = {name: jax.typeof(x).sharding for name, x in arrays.items()}
    mesh = types["u"].mesh
    if AxisType.Explicit not in mesh.axis_types or not any(any(t.spec) for t in types.values()):
        return None
    batch, _, heads, _ = types["u"].spec
    return Division(mesh, batch, heads)


def divide(
    function: Callable[..., DeltaRuleOutput], division: Division, arrays: dict[str, jax.Array]
) -> DeltaRuleOutput:
    """`function(**arrays)` on each device for its own batch entries, heads and tokens.

    Raises:
        ValueError: an axis that does not exist, or one that does not divide what it is to divide.
    """
    mesh, batch, heads, sequence = division
    for name, axes, size in zip(
        ("batch", "sequence", "heads"), (batch, sequence, heads), arrays["k"].shape, strict=False
    ):
        _check_divisible(mesh, name, axes, size)
    time, state = PartitionSpec(batch, sequence, heads), PartitionSpec(batch, heads)
    specs = {n: time if n in _TIME else state if n in _STATE else PartitionSpec(batch, sequence) for n in arrays}
    if AxisType.Explicit in mesh.axis_types:
        arrays = {n: jax.sharding.reshard(x, NamedSharding(mesh, specs[n])) for n, x in arrays.items()}
    out: Any = (time if "q" in arrays else None, state, state if "log_mu" in arrays else None)
    run = jax.shard_map(
        lambda arrays: function(**{"q": None, **arrays}),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=DeltaRuleOutput(*out),
        check_vma=False,  # kernels do not say along which mesh axes their results vary
    )
    return jax.jit(run)(arrays)  # run eagerly, the exchange of states crashes the compiler (jax 0.11.2)


def _check_divisible(mesh: Any, name: str, axes: Axes, size: int) -> None:
    parts = 1
    for axis in (axes,) if isinstance(axes, str) else axes or ():
        if axis not in mesh.shape:
            raise ValueError(f"{name}: the mesh has no axis {axis!r}; it has {', '.join(mesh.axis_names)}")
        parts *= mesh.shape[axis]
    if size % parts:
        what = {"batch": "batch entries", "sequence": "tokens", "heads": "key heads"}[name]
        raise ValueError(f"{name}={axes!r} divides by {parts}, which does not divide the {size} {what}")
