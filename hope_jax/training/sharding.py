"""Which axis of which array lies on which axis of the mesh: one ordered table, first match wins.

A rule is a regular expression searched in the path of a leaf ("layers/attention/query/kernel") and a
PartitionSpec for its LAST dimensions: layers are stacked on a leading axis, which is never divided. The
optimizer's moments sit under the same path suffix as their parameter, so the same table serves the whole
training state.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hope_jax import placement
from hope_jax.training.config import MeshConfig
from hope_jax.training.errors import UserError
from hope_jax.types import path_string

BATCH = P(placement.BATCH)

RULES: tuple[tuple[str, P], ...] = (
    (r"(^|/)embedding$", P("tensor", "fsdp")),  # the vocabulary over tensor
    (r"(^|/)head$", P("fsdp", "tensor")),  # the same, the other way round
    (r"/mixer/w[qkv]$|/mixer/w_gate$", P("fsdp", "tensor")),  # heads over tensor
    (r"/mixer/wo$|/mixer/w_out$", P("tensor", "fsdp")),
    (r"/(attention|recall)/w[qkv]$|/recall/w_gate$", P("fsdp", "tensor")),
    (r"/(attention|recall)/w(o|_out)$", P("tensor", "fsdp")),
    (r"/memory/(in_proj|static/\w+|w[qkvrxh]|memory_[qkv])$", P("fsdp", "tensor")),
    (r"/memory/boxes/\w+/w[12]$|/memory/start/(level_\d+/)?\w+$", P("tensor", "fsdp", None)),  # one matrix per head
    (r"/memory/conv/\w+$", P("tensor", None)),
    (r"/mlp/w_(gate|up)$", P("fsdp", "tensor")),  # hidden width over tensor
    (r"/mlp/w_down$", P("tensor", "fsdp")),
    (r"/cms/level_\d+/w2$", P("fsdp", "tensor")),
    (r"/cms/level_\d+/w1$", P("tensor", "fsdp")),
    (r".*", P()),
)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a run.

    Axis type Auto on purpose: the compiler places the activations after our hints (`hope_jax/placement.py`), we place
    inputs, parameters and state.

    Args:
      config: the size of each axis. Over several slices of TPUs "data" is the axis between them.
      devices: of all processes, as many as the mesh needs; None takes the first that there are.
    Raises:
      UserError: there are fewer devices than the mesh needs, or several slices do not divide "data".
    """
    shape = tuple(getattr(config, name) for name in placement.AXES)
    needed, devices = math.prod(shape), jax.devices() if devices is None else devices
    if needed > len(devices):
        raise UserError(
            f"the mesh {config.describe()} needs {needed} devices, {len(devices)} visible; make the mesh smaller "
            f"(on a CPU, JAX_NUM_CPU_DEVICES={needed} makes virtual devices)"
        )
    return Mesh(_arranged(shape, devices[:needed]), placement.AXES, axis_types=(AxisType.Auto,) * len(shape))


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array of this shape, neighbours on a torus beside each other, slices along the first axis."""
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    if slices <= 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise UserError(f"{slices} slices need mesh.data to be a multiple of {slices}; it is {shape[0]}")
    inside, between = (shape[0] // slices, *shape[1:]), (slices, *(1 for _ in shape[1:]))
    return mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)


def rows_on(sharding: NamedSharding, count: int, devices: Iterable[Any]) -> list[int]:
    """Which of the `count` rows of a batch lie on some devices, ascending."""
    places = sharding.devices_indices_map((count,))
    return sorted({row for device in devices for row in range(count)[places[device][0]]})


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[tuple[str, P]] = RULES) -> P:
    """The PartitionSpec of one leaf.

    Args:
      path: "/"-joined keys.
      shape: of the leaf; an axis that the mesh axis does not divide is left whole.
      mesh: the mesh.
      rules: (pattern, spec for the last dimensions), first match wins.
    Returns:
      A PartitionSpec of as many entries as the leaf has dimensions.

    >>> mesh = make_mesh(MeshConfig())
    >>> spec_for("layers/mlp/up", (4, 32, 64), mesh, [("mlp/up$", P("fsdp", "tensor"))]) == P(None, "fsdp", "tensor")
    True
    """
    spec = next(spec for pattern, spec in rules if re.search(pattern, path))
    if len(spec) > len(shape):
        return P()
    aligned = (None,) * (len(shape) - len(spec)) + tuple(spec)
    return P(
        *(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(aligned, shape, strict=True))
    )


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A tree of NamedSharding for a tree of arrays (or shapes)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_for(path_string(path), leaf.shape, mesh)), tree
    )
