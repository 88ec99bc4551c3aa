"""On a mesh: the numbers of one device, no communication, and clear refusals."""

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from hope_kernels import Config, delta_rule, delta_rule_sharded
from hope_kernels.delta_rule.arg_specs import ArgSpec, make_arguments
from hope_kernels.testing import relative_error, tolerance

SPEC = ArgSpec(batch=4, tokens=20, heads=4, key_width=4, value_width=3, momentum=True, key_heads=2, documents=2)


SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def long_mesh():
    return jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


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
    ("changes", "static"),
    [
        ({"key_heads": 2, "documents": 3}, {"read": "before"}),
        pytest.param({"momentum": True, "documents": 3}, {"config": Config(segments=2)}, marks=SLOW),
        pytest.param({"documents": 3}, {"read": "start"}, marks=SLOW),
        pytest.param({"erase": False}, {}, marks=SLOW),
        pytest.param({"decay": False}, {"implementation": "xla"}, marks=SLOW),
    ],
)
def test_a_divided_sequence_is_the_whole_one(long_mesh, changes, static):
    """Tokens over four devices, states handed from shard to shard: reads, last state, every gradient."""
    spec = SPEC._replace(**{"momentum": False, "key_heads": None, "documents": 1, **changes})
    arguments = make_arguments(spec)
    ids = arguments.pop("segment_ids", None)

    def loss(run, arguments):
        out = run(**arguments, **({} if ids is None else {"segment_ids": ids}), **static)
        out = [x for x in out if x is not None]
        return sum(jnp.sum(jnp.sin((1 + i) * x)) for i, x in enumerate(out)), out

    def sharded(**arguments):
        return delta_rule_sharded(mesh=long_mesh, batch="data", sequence="sequence", **arguments)

    found = jax.jit(jax.grad(lambda a: loss(sharded, a), has_aux=True))
    expected = jax.jit(jax.grad(lambda a: loss(delta_rule, a), has_aux=True))(arguments)
    for x, y in zip(jax.tree.leaves(found(arguments)), jax.tree.leaves(expected), strict=True):
        assert relative_error(x, y) <= tolerance(x.dtype, spec.tokens * spec.batch)


def test_a_divided_sequence_outside_jit(long_mesh):
    arguments = make_arguments(SPEC._replace(documents=1))
    found: Any = delta_rule_sharded(mesh=long_mesh, batch="data", sequence="sequence", **arguments)
    expected: Any = delta_rule(**arguments)
    assert relative_error(found.y, expected.y) <= tolerance("float32", SPEC.tokens * SPEC.batch)


@SLOW
def test_a_divided_sequence_exchanges_states_and_not_tokens(long_mesh):
    arguments = make_arguments(SPEC._replace(momentum=False, tokens=400))
    spec = jax.sharding.PartitionSpec
    placed = {
        n: jax.device_put(a, jax.NamedSharding(long_mesh, spec("data", None if "initial" in n else "sequence")))
        for n, a in arguments.items()
        if n != "segment_ids"
    }
    run: Any = partial(delta_rule_sharded, mesh=long_mesh, batch="data", sequence="sequence")
    program = jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(run(**a).y)))).lower(placed).compile().as_text() or ""
    gathers = [math.prod(map(int, s.split(","))) for s in re.findall(r"= f32\[([\d,]+)\]\S* all-gather", program)]
    # Two rows and four heads on a device, four shards, maps of 4 x (4 + 3).
    assert gathers and max(gathers) <= 2 * 4 * 4 * 4 * (4 + 3)
    assert "all-to-all" not in program


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"heads": "model"}, ValueError, "heads: the mesh has no axis 'model'; it has data, fsdp, tensor"),
        ({"heads": ("data", "tensor")}, ValueError, "divides by 4, which does not divide the 2 key heads"),
        ({"batch": ("data", "fsdp", "tensor")}, ValueError, "divides by 8, which does not divide the 4 batch entries"),
        (
            {"sequence": "tensor", "implementation": "reference"},
            NotImplementedError,
            "is not divided over the mesh axis",
        ),
        ({"key": jnp.zeros(3)}, TypeError, "no array named key"),
    ],
)
def test_refusals(mesh, changes, error, message):
    with pytest.raises(error, match=message):
        delta_rule_sharded(**{"mesh": mesh, **make_arguments(SPEC), **changes})
