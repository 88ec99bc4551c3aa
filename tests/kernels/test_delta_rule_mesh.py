"""`delta_rule` itself on a mesh: who divides it, what then runs, and the numbers of one device."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hope_kernels import Config, delta_rule, delta_rule_sharded, explain
from hope_kernels.delta_rule.arg_specs import ArgSpec, argument_shapes, make_arguments
from hope_kernels.testing import FAST_COMPILE, relative_error, tolerance

# A call that `pallas_tpu` takes on one device, in the tiles of a small simulation.
SPEC = ArgSpec(batch=4, tokens=64, heads=4, key_width=64, value_width=64, key_heads=2, documents=2)
SIMULATED = Config(block_t=32, interpret=True)
AXES = {"data": 4, "tensor": 2}


def mesh_of(axis_type: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh(tuple(AXES.values()), tuple(AXES), axis_types=(axis_type,) * len(AXES))


def placed(arrays: dict[str, Any], mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Batch over "data", heads over "tensor"."""

    def spec(name: str) -> PartitionSpec:
        if name == "segment_ids":
            return PartitionSpec("data")
        return PartitionSpec("data", "tensor") if name.startswith("initial") else PartitionSpec("data", None, "tensor")

    def place(x: Any, sharding: NamedSharding) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.device_put(x, sharding)

    return {name: place(x, NamedSharding(mesh, spec(name))) for name, x in arrays.items()}


def loss(arrays: dict[str, Any], ids: jax.Array, run: Any = delta_rule, **how: Any) -> jax.Array:
    out = run(**arrays, segment_ids=ids, **how)
    return jnp.sum(jnp.sin(out.y)) + jnp.sum(out.state**2)


def choice(function: Any, *arguments: Any) -> str:
    """What is chosen, and why not `pallas_tpu`."""
    return explain(function, *arguments).partition("; 'pallas_gpu'")[0]


@pytest.fixture(scope="module")
def expected():
    arrays = make_arguments(SPEC)
    ids = arrays.pop("segment_ids")
    return jax.jit(jax.value_and_grad(partial(loss, implementation="xla")))(arrays, ids)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_the_numbers_of_one_device(axis_type, expected):
    """The compiler divides the form in plain jax; a kernel runs where the types of the arrays say how to divide."""
    mesh = mesh_of(axis_type)
    arrays = placed(make_arguments(SPEC), mesh)
    ids = arrays.pop("segment_ids")
    both = jax.value_and_grad(partial(loss, config=SIMULATED))
    said = choice(both, arrays, ids)
    if axis_type == AxisType.Explicit:
        assert said == "delta_rule: 'pallas_tpu' runs"
    else:
        reason = "the compiler cannot divide a kernel over a mesh (data 4, tensor 2); delta_rule_sharded divides it"
        assert said == f"delta_rule: 'xla' runs; 'pallas_tpu' cannot run: {reason}"
    found = jax.jit(both, compiler_options=FAST_COMPILE)(arrays, ids)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(x, y) <= tolerance(x.dtype, SPEC.tokens * SPEC.batch)


def test_a_mesh_in_context_counts_where_arrays_lie_nowhere():
    shapes = argument_shapes(SPEC)
    run = partial(delta_rule, config=SIMULATED)
    assert choice(lambda a: run(**a), shapes) == "delta_rule: 'pallas_tpu' runs"
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        assert choice(lambda a: run(**a), shapes).startswith("delta_rule: 'xla' runs; 'pallas_tpu' cannot run: the c")
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])):
        assert choice(lambda a: run(**a), shapes) == "delta_rule: 'pallas_tpu' runs"


def test_a_named_kernel_is_not_replaced():
    arrays = placed(argument_shapes(SPEC), mesh_of(AxisType.Auto))
    run = partial(delta_rule, config=SIMULATED, implementation="pallas_tpu")
    with pytest.raises(NotImplementedError, match=r"cannot divide a kernel.*\(data 4, tensor 2\); delta_rule_sharded"):
        explain(lambda a: run(**a), arrays)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_what_is_divided_by_hand_is_divided_once(axis_type):
    mesh = mesh_of(axis_type)
    arrays = placed(argument_shapes(SPEC), mesh)
    by_hand = partial(delta_rule_sharded, mesh=mesh, batch="data", heads="tensor", config=SIMULATED)
    assert choice(lambda a: by_hand(**a), arrays) == "delta_rule: 'pallas_tpu' runs"
    assert str(jax.make_jaxpr(lambda a: by_hand(**a))(arrays)).count("shard_map[") == 1


def test_an_axis_that_vmap_took_is_the_compilers():
    """The types inside `vmap` do not show it; what they do show is divided."""
    mesh = mesh_of(AxisType.Explicit)
    lying = NamedSharding(mesh, PartitionSpec("data", None, None, "tensor"))
    x = jax.ShapeDtypeStruct((4, 1, 64, 2, 64), jnp.float32, sharding=lying)
    run = jax.vmap(lambda k: delta_rule(k, k, k, config=SIMULATED).y)
    assert "cannot divide a kernel over a mesh (data 4)" in choice(run, x)
    assert jax.eval_shape(run, x).sharding.spec == PartitionSpec("data", None, None, "tensor", None)


def test_heads_that_cannot_be_divided_say_so():
    mesh = mesh_of(AxisType.Explicit)
    arrays = argument_shapes(SPEC._replace(heads=6, key_heads=3, documents=1))
    k = arrays["k"]
    u = placed({"u": arrays["u"]}, mesh)["u"]
    with pytest.raises(ValueError, match="heads='tensor' divides by 2, which does not divide the 3 key heads"):
        jax.eval_shape(lambda k, u: delta_rule(None, k, u), k, u)
