"""Compiles every kind of call of the TPU kernels, with gradients, for the topology it is given; prints what failed.

A program of its own: the TPU compiler wants its environment before it is loaded.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from hope_kernels import delta_rule
from hope_kernels.delta_rule.arg_specs import ArgSpec, make_arguments

SPEC = ArgSpec(batch=2, tokens=256, heads=4, key_width=128, value_width=128, dtype="bfloat16")
CALLS: dict[str, tuple[ArgSpec, dict[str, Any]]] = {
    "read before": (SPEC, {"read": "before"}),
    "read start": (SPEC, {"read": "start"}),
    "documents": (SPEC._replace(documents=2), {}),
    "K = 64": (SPEC._replace(key_width=64, value_width=64), {}),
    "K = 256": (SPEC._replace(key_width=256, value_width=256, tokens=128), {}),
    "five memories": (SPEC._replace(key_width=64, value_width=320, heads=2), {}),
    "six memories": (SPEC._replace(value_width=768, heads=2), {}),
    "grouped": (SPEC._replace(key_heads=2), {}),
    "one head": (SPEC._replace(heads=1, batch=4), {}),
    "float32": (SPEC._replace(dtype="float32", heads=2), {}),
    "no erasure": (SPEC._replace(erase=False), {}),
    "no decay": (SPEC._replace(decay=False), {}),
    "state only": (SPEC, {"q": None}),
    "high precision": (SPEC._replace(heads=2), {"precision": "high"}),
    "fast": (SPEC._replace(heads=2), {"precision": "fast"}),
    "all at once": (SPEC._replace(key_width=64, value_width=64, key_heads=2, documents=2), {"read": "before"}),
}


def compile_call(device: Any, spec: ArgSpec, options: dict[str, Any]) -> None:
    """Raise if the call or its gradient does not compile."""
    sharding = SingleDeviceSharding(device)
    arrays = {n: x for n, x in jax.eval_shape(lambda: make_arguments(spec)).items() if n not in options}
    shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for n, x in arrays.items()}
    ids = {n: shapes.pop(n) for n in ("segment_ids",) if n in shapes}

    def loss(arrays: Any, ids: Any) -> jax.Array:
        out = delta_rule(**arrays, **ids, **options, implementation="pallas_tpu")
        return sum((jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(out)), jnp.zeros(()))

    with jax.default_device(device):
        jax.jit(jax.grad(loss)).lower(shapes, ids).compile()


def main(topology: str) -> None:
    device = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices[0]
    for name, (spec, options) in CALLS.items():
        try:
            compile_call(device, spec, options)
        except Exception as error:  # whatever the compiler raises is what the test reports
            print(f"{name}: {type(error).__name__}: {str(error)[:500]}")
        else:
            print(f"{name}: compiled")


if __name__ == "__main__":
    main(sys.argv[1])
