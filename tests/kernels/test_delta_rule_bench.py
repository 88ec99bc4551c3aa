"""What the benchmark calls: the base it compares with, the foreign library's arguments, and the measurements."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_kernels import delta_rule
from hope_kernels.delta_rule import bench, flash_linear_attention, straightforward
from hope_kernels.delta_rule.arg_specs import ARG_SPECS, ArgSpec, argument_shapes, make_arguments
from hope_kernels.measuring import measure, sample_side_by_side
from hope_kernels.testing import check_op

SPEC = ArgSpec(2, 32, 2, 5, 3)


def test_the_base_is_the_delta_rule():
    """Output, state and every gradient, over two chunks."""
    check_op(
        lambda **arrays: straightforward.chunked(**arrays, chunk=16),
        lambda **arrays: tuple(delta_rule(**arrays, implementation="reference"))[:2],
        make_arguments(SPEC),
        length=37,
    )
    with pytest.raises(ValueError, match="got 5 and 32"):
        straightforward.chunked(**make_arguments(SPEC), chunk=5)


def test_the_base_says_what_it_is_not_written_for():
    assert straightforward.why_not(SPEC) is None
    for changes in ({"erase": False}, {"momentum": True}, {"documents": 2}, {"key_heads": 1}, {"dtype": "bfloat16"}):
        assert straightforward.why_not(SPEC._replace(**changes))
    assert straightforward.why_not(SPEC._replace(tokens=65)) == "it takes multiples of 64 tokens; there are 65"


def test_the_foreign_arguments_mean_the_same():
    """The gated delta rule as that library defines it, token by token, gives our reads and state."""
    inputs = make_arguments(SPEC)
    theirs = {name: np.asarray(x, np.float64) for name, x in flash_linear_attention.translate(inputs).items()}
    s, reads = theirs["initial_state"], []
    for t in range(SPEC.tokens):
        q, k, v, beta = (theirs[name][:, t] for name in ("q", "k", "v", "beta"))
        s = np.exp(theirs["g"][:, t])[..., None, None] * s
        error = v - np.einsum("bhk,bhkv->bhv", k, s)
        s = s + np.einsum("bh,bhk,bhv->bhkv", beta, k, error)
        reads.append(np.einsum("bhk,bhkv->bhv", q, s))
    ours = delta_rule(**inputs, implementation="reference")
    np.testing.assert_allclose(np.stack(reads, 1), np.asarray(ours.y), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(s, ours.state, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("fla") is not None, reason="flash-linear-attention is installed")
def test_the_foreign_library_is_optional():
    assert "fla" in (bench.reason(bench.FOREIGN, SPEC) or "")


@pytest.mark.parametrize("name", ["short", "layer_momentum", "layer_bfloat16"])
def test_shapes_without_arrays(name):
    spec = ARG_SPECS[name]._replace(tokens=8, documents=2)
    arrays = jax.eval_shape(lambda: make_arguments(spec))
    assert {n: (x.shape, x.dtype) for n, x in arrays.items()} == {
        n: (x.shape, x.dtype) for n, x in argument_shapes(spec).items()
    }
    case, shapes = bench.make_case(spec), bench.shapes(spec)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), case) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


def test_gradients_are_of_every_floating_point_array():
    spec = SPEC._replace(documents=2, momentum=True)
    inputs, cotangents = bench.make_case(spec)
    assert len(cotangents) == 3
    out, gradients = jax.jit(bench.function(spec, "xla", "forward+gradients", 16))((inputs, cotangents))
    assert len(out) == 3
    assert set(gradients) == set(inputs) - {"segment_ids"}


def test_what_runs_here():
    assert bench.chosen(SPEC) in bench.OP.implementations
    assert bench.reason("xla", SPEC) is None
    if jax.devices()[0].platform == "cpu":
        assert "needs a TPU" in (bench.reason("pallas_tpu", SPEC._replace(key_width=64, value_width=64)) or "")


def test_a_measurement():
    rows = measure(bench.OP, "tiny", "forward", ("xla", "straightforward"), None, spec=SPEC, block_t=16, repeats=2)
    assert [row.implementation for row in rows] == ["xla", "straightforward"]
    for row in rows:
        assert row.repeats == 2 and row.fastest <= row.seconds and row.spread >= 0
        assert row.tokens == 64 and row.token_heads == 128
        assert row.ns_per_token_head == pytest.approx(row.seconds / 128 * 1e9)
        assert row.tokens_per_second == pytest.approx(64 / row.seconds)
        assert row.of_compute is None and row.of_bandwidth is None  # no chip was given
        assert row.compile_seconds and row.memory and row.memory > 4 * 2 * 32 * 2 * (5 + 5 + 3 + 3)


def test_turns_end_when_the_time_is_up():
    """Start and end of each call on a clock of our own; at least three turns."""
    ticks = iter(range(0, 1000, 5))
    samples = sample_side_by_side(
        {"sin": jnp.sin, "cos": jnp.cos}, jnp.ones(3), repeats=50, seconds=0.0, clock=lambda: float(next(ticks))
    )
    assert {name: sample.seconds for name, sample in samples.items()} == {"sin": [5.0] * 3, "cos": [5.0] * 3}
    assert samples["sin"].clock == "host"
