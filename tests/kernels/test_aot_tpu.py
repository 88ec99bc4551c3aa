"""The TPU kernels compile for real chips, and their schedules stay within the committed budget. Needs libtpu only."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from hope_kernels import delta_rule, delta_rule_sharded
from hope_kernels.aot import Job, report, reports
from hope_kernels.delta_rule.arg_specs import ArgSpec, argument_shapes
from hope_kernels.delta_rule.pallas_tpu import budget
from tests.kernels import aot_calls

pytest.importorskip("libtpu")
pytestmark = pytest.mark.aot


@pytest.mark.slow
@pytest.mark.parametrize("topology", budget.TOPOLOGIES)
def test_schedule_is_within_the_budget(topology):
    """At most a tenth worse; after an improvement, python -m hope_kernels.delta_rule.pallas_tpu.budget --write."""
    allowed = budget.committed()[topology]
    for kernel, found in budget.measure(topology).items():
        for name in ("bundles", "spills"):
            assert found[name] <= 1.1 * allowed[kernel][name], (kernel, name, found, allowed[kernel])


@pytest.mark.slow
@pytest.mark.parametrize("topology", budget.TOPOLOGIES)
def test_every_kind_of_call_compiles(topology):
    settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    program = [sys.executable, str(Path(aot_calls.__file__)), topology]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name}: compiled" for name in aot_calls.CALLS]


def sharded(mesh: Any, inputs: Any, *states: jax.Array) -> Any:
    """Forward and backward, batch entries and heads divided over the mesh."""
    specs = (PartitionSpec("data", None, "tensor"), PartitionSpec("data", "tensor"))
    every = (specs[0], specs[1], specs[0], specs[1])
    out = ((specs[0], specs[1]), (specs[0], specs[1]))

    def local(inputs, *states):
        (y, end), (d_inputs, d_start) = budget.with_gradient("default", inputs, *states)
        return (y, end.s), (d_inputs, d_start)

    return jax.shard_map(local, mesh=mesh, in_specs=every, out_specs=out, check_vma=False)(inputs, *states)


def mesh_job(topology: str, axes: dict[str, int]) -> Job:
    arguments = budget.arguments(batch=axes["data"], heads=2 * axes["tensor"], tokens=256)
    time, state = PartitionSpec("data", None, "tensor"), PartitionSpec("data", "tensor")
    return Job(topology, sharded, arguments, "delta_rule_backward", axes, (time, state, time, state), profile=False)


@pytest.mark.parametrize(
    ("topology", "axes"),
    [
        ("v5e:4x4", {"data": 4, "tensor": 4}),
        ("v5p:8x8x16", {"data": 64, "tensor": 16}),
    ],
)
def test_nothing_is_gathered_on_a_mesh(topology, axes):
    text = report(mesh_job, topology, axes).text
    assert text.count("tpu_custom_call") >= 2
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text


SPEC = ArgSpec(batch=8, tokens=128, heads=8, key_width=128, value_width=128, key_heads=4, dtype="bfloat16")
SHAPES = argument_shapes(SPEC)
LYING = {
    name: PartitionSpec("data", "tensor") if name == "initial_state" else PartitionSpec("data", None, "tensor")
    for name in SHAPES
}


def public_gradient(how: str, mesh: Any, *arrays: jax.Array) -> Any:
    """Value and gradient of the public function on arrays divided by batch and heads; `how` says who divides it."""
    run: Any = partial(delta_rule_sharded, mesh=mesh, batch="data", heads="tensor") if how == "by hand" else delta_rule

    def loss(arrays):
        return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in run(**arrays) if x is not None)

    def gradient(arrays):
        out, pullback = jax.vjp(loss, arrays)
        return pullback(jnp.ones_like(out))

    arguments = dict(zip(SHAPES, arrays, strict=True))
    if how != "by type":
        return gradient(arguments)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.sharding.explicit_axes(gradient, in_sharding=(LYING,))(arguments)


def public_jobs() -> list[Job]:
    axes = {"data": 4, "tensor": 4}
    return [
        Job("v5e:4x4", partial(public_gradient, how), [*SHAPES.values()], "", axes, [*LYING.values()], False)
        for how in ("by hand", "by type", "by the compiler")
    ]


@pytest.mark.slow
def test_the_public_function_on_a_mesh_gathers_nothing():
    texts = [found.text for found in reports(public_jobs)]
    assert [text.count('custom_call_target="tpu_custom_call"') for text in texts] == [2, 2, 0]
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert not any(collective in text for text in texts)


def gradient_with_policy(names: tuple[str, ...], *arrays: Any) -> Any:
    """Value and gradient of a rematerialised call that keeps only what is named."""
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def loss(inputs, start):
        return jnp.sum(budget.reads_and_state("default", inputs, start)[0].astype(jnp.float32))

    return jax.value_and_grad(jax.checkpoint(loss, policy=policy))(*arrays)


def policy_jobs() -> list[Job]:
    arguments = budget.arguments(heads=2, tokens=256)[:2]
    names = ("delta_rule_states", "delta_rule_inverse")
    return [
        Job("v6e:2x2", partial(gradient_with_policy, n), arguments, "delta_rule_backward", profile=False)
        for n in (names, ())
    ]


@pytest.mark.slow
def test_a_policy_keeps_or_recomputes_the_residuals():
    kept, recomputed = (r.text.count('custom_call_target="tpu_custom_call"') for r in reports(policy_jobs))
    assert (kept, recomputed) == (2, 3)


def job_of_refused_keys() -> Job:
    keys = jax.ShapeDtypeStruct((1, 512, 16, 96), jnp.bfloat16)
    return Job("v6e:2x2", lambda k: delta_rule(k, k, k, implementation="pallas_tpu"), [keys], profile=False)


def test_what_does_not_compile_says_so():
    with pytest.raises(RuntimeError, match=r"does not compile:\nNotImplementedError.*not 96"):
        report(job_of_refused_keys)


def test_what_another_process_cannot_import_is_refused():
    with pytest.raises(ValueError, match="pass a function of a module"):
        report(lambda: budget.job("v6e:2x2", "forward"))
