"""What the benchmark calls for the MLP memory: its base, its counts, and a measurement."""

import math
from functools import partial

import jax
import pytest

from hope_kernels.measuring import measure
from hope_kernels.mlp_memory import bench, mlp_memory, straightforward
from hope_kernels.mlp_memory.arg_specs import ARG_SPECS, TITANS, ArgSpec, make_arguments
from hope_kernels.mlp_memory.cost import cost
from hope_kernels.testing import FAST_COMPILE, check_op

SPEC = ArgSpec(2, 8, 2, 4, 3, chunk_size=4)


@pytest.mark.parametrize("spec", [SPEC, SPEC._replace(momentum=False, decay=False, erase=True)])
def test_the_base_is_the_memory(spec):
    """Reads, state and every gradient, over two chunks."""
    options = {"chunk_size": spec.chunk_size, **({} if spec.erase else TITANS)}
    check_op(
        partial(straightforward.checkpointed, **options),
        partial(mlp_memory, **options, implementation="reference"),
        make_arguments(spec),
        length=spec.tokens + spec.width + spec.hidden,
        compiler_options=FAST_COMPILE,
    )


def test_the_base_says_what_it_is_not_written_for():
    assert straightforward.why_not(SPEC) is None
    assert (
        straightforward.why_not(SPEC._replace(tokens=9)) == "it takes whole chunks; there are 9 tokens in chunks of 4"
    )


def products(jaxpr) -> int:
    """Operations of all matrix products in a program, loops included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = [x for x in equation.params.values() if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
        total += times * sum(products(getattr(x, "jaxpr", x)) for x in inner)
    return total


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("erase", [False, True])
def test_the_counts_are_those_of_the_program(erase, momentum):
    """Forward, in chunks small beside the widths: then only the triangular inverse is computed less cleverly."""
    spec = SPEC._replace(tokens=16, width=64, hidden=32, erase=erase, momentum=momentum)
    inputs, _ = bench.shapes(spec)
    counted = products(jax.make_jaxpr(partial(bench.outputs, spec, "xla", None))(inputs).jaxpr)
    assert counted == pytest.approx(cost(spec, "forward").flops, rel=0.01)


def test_a_measurement():
    rows = measure(bench.OP, "tiny", "forward+gradients", ("xla", "straightforward"), None, spec=SPEC, repeats=2)
    assert [(row.implementation, row.chosen) for row in rows] == [("xla", True), ("straightforward", False)]
    for row in rows:
        assert (row.tokens, row.token_heads) == (16, 32)
        assert row.fastest <= row.seconds and row.memory and row.memory > 4 * 2 * 8 * 2 * 7 * 4


def test_every_shape_has_arrays_outputs_and_a_cost():
    for spec in ARG_SPECS.values():
        inputs, cotangents = bench.shapes(spec)
        assert inputs["q"].shape == cotangents[0].shape == (spec.batch, spec.tokens, spec.heads, spec.width)
        forward, both = (cost(spec, mode) for mode in ("forward", "forward+gradients"))
        assert 0 < forward.flops < both.flops and 0 < forward.bytes < both.bytes
    for platform in ("cpu", "tpu"):
        assert set(bench.defaults(platform)) < set(ARG_SPECS)
