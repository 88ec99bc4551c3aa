"""On a mesh: the numbers of one device, no communication, and clear refusals."""

import re

import jax
import jax.numpy as jnp
import pytest

from hope_kernels import delta_rule, delta_rule_sharded
from hope_kernels.delta_rule.arg_specs import ArgSpec, make_arguments
from hope_kernels.testing import relative_error, tolerance

SPEC = ArgSpec(batch=4, tokens=20, heads=4, key_width=4, value_width=3, momentum=True, key_heads=2, documents=2)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)


def test_values_and_gradients_without_communication(mesh):
    arguments = make_arguments(SPEC)
    ids = arguments.pop("segment_ids")

    def loss(run, arguments):
        out = run(**arguments, segment_ids=ids, read="before")
        return sum(jnp.sum(jnp.sin(x)) for x in out)

    def sharded(**arguments):
        return delta_rule_sharded(mesh=mesh, batch=("data", "fsdp"), heads="tensor", **arguments)

    found = jax.jit(jax.value_and_grad(lambda a: loss(sharded, a)))
    expected = jax.jit(jax.value_and_grad(lambda a: loss(delta_rule, a)))(arguments)
    for x, y in zip(jax.tree.leaves(found(arguments)), jax.tree.leaves(expected), strict=True):
        assert relative_error(x, y) <= tolerance(x.dtype, SPEC.tokens * SPEC.batch)

    spec = jax.sharding.PartitionSpec
    placed = {
        n: jax.device_put(
            a, jax.NamedSharding(mesh, spec(("data", "fsdp"), *(["tensor"] if "initial" in n else [None, "tensor"])))
        )
        for n, a in arguments.items()
    }
    program = jax.jit(jax.grad(lambda a: loss(sharded, a))).lower(placed).compile().as_text()
    assert program and not re.search("all-gather|all-to-all|collective-permute|all-reduce", program)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"heads": "model"}, ValueError, "heads: the mesh has no axis 'model'; it has data, fsdp, tensor"),
        ({"heads": ("data", "tensor")}, ValueError, "divides by 4, which does not divide the 2 key heads"),
        ({"batch": ("data", "fsdp", "tensor")}, ValueError, "divides by 8, which does not divide the 4 batch entries"),
        ({"key": jnp.zeros(3)}, TypeError, "no array named key"),
    ],
)
def test_refusals(mesh, changes, error, message):
    with pytest.raises(error, match=message):
        delta_rule_sharded(**{"mesh": mesh, **make_arguments(SPEC), **changes})
