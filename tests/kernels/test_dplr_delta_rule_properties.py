"""What holds for every implementation, whatever the numbers; and wrong calls say what was wrong."""

import doctest
import importlib
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from hope_kernels import dplr_delta_rule
from hope_kernels.dplr_delta_rule import bench
from hope_kernels.dplr_delta_rule.arg_specs import ARG_SPECS, ArgSpec, make_arguments
from hope_kernels.dplr_delta_rule.decay import faded
from hope_kernels.measuring import measure
from hope_kernels.testing import FAST_COMPILE, relative_error, tolerance

SPEC = ArgSpec(batch=2, tokens=33, heads=3, key_width=6, value_width=4)
TIME_ARGUMENTS = ("q", "k", "u", "b", "c", "log_alpha")
EVERY = pytest.mark.parametrize("implementation", ["reference", "xla"])


@pytest.fixture(scope="module")
def arguments():
    return make_arguments(SPEC)


def call(implementation="xla", **static) -> Any:
    return partial(dplr_delta_rule, implementation=implementation, **static)


def jit(function) -> Any:
    return jax.jit(function, compiler_options=FAST_COMPILE)


@cache
def run_of(implementation) -> Any:
    """In tiles of 8 tokens."""
    return jit(call(implementation, block_t=8))


def assert_close(found, expected, length=39):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(x, y) <= tolerance(x.dtype, length)


def assert_equal(found, expected):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("size", [1, 2, 3, 16, 21])
def test_scores_are_the_sums_of_faded_products(x64, rng, size):
    """(P4) pair by pair, with channels that keep next to nothing, nothing at all, and everything."""
    readers, writers = rng.normal(size=(2, size, 5)), rng.normal(size=(3, size, 5))
    log_alpha = np.where(rng.uniform(size=(size, 5)) < 0.5, rng.choice([-30.0, -9.0, 0.0], (size, 5)), -0.1)
    found = faded(*(jnp.asarray(x) for x in (readers, writers, log_alpha)))
    expected = np.zeros((2, 3, size, size))
    for t in range(size):
        for i in range(t + 1):
            between = np.exp(log_alpha[i + 1 : t + 1].sum(axis=0))
            expected[:, :, t, i] = (readers[:, t] * between) @ writers[:, i].T
    np.testing.assert_allclose(found.scores_RWCC, expected, rtol=0, atol=1e-14)
    np.testing.assert_allclose(found.since_start_CK, np.cumsum(log_alpha, axis=0), rtol=1e-14)
    np.testing.assert_allclose(found.until_end_CK + found.since_start_CK, np.tile(log_alpha.sum(0), (size, 1)))


def test_a_channel_that_has_lost_everything_is_at_full_precision_again():
    """Sums over one long stretch would have lost 2^-24 of their size, here 1e-5 of every later decay."""
    log_alpha = np.concatenate([np.full((16, 4), -9.0), np.linspace(-0.02, -0.01, 64).reshape(16, 4)]).astype("float32")
    ones = jnp.ones((1, 32, 4))
    found = faded(ones, ones, jnp.asarray(log_alpha)).scores_RWCC[0, 0, 16:, 16:]
    total = np.cumsum(log_alpha[16:].astype("float64"), axis=0)
    expected = np.tril(np.exp(total[:, None] - total[None]).sum(-1))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_tile_changes_nothing(arguments):
    one_tile = jit(call(block_t=33))(**arguments)
    for block_t in (1, 7):
        assert_close(jit(call(block_t=block_t))(**arguments), one_tile)


@pytest.mark.parametrize(("at", "exact"), [(16, True), (11, False)])
def test_two_calls_are_one(arguments, at, exact):
    """Bit for bit when the split falls between tiles."""
    run = run_of("xla")
    first = run(**{n: a[:, :at] if n in TIME_ARGUMENTS else a for n, a in arguments.items()})
    second = run(**{n: arguments[n][:, at:] for n in TIME_ARGUMENTS}, initial_state=first.state)
    found = (jnp.concatenate([first.y, second.y], axis=1), second.state)
    (assert_equal if exact else assert_close)(found, tuple(run(**arguments)))


@EVERY
def test_a_rule_that_does_nothing_leaves_the_state_bit_for_bit(implementation, arguments):
    run, state = run_of(implementation), arguments["initial_state"]
    idle = {n: jnp.zeros_like(arguments[n]) for n in ("u", "b", "log_alpha")}
    assert_equal(run(**arguments | idle).state, state)
    assert_equal(run(**arguments, mask=jnp.zeros((2, 33, 3), bool)).state, state)


@EVERY
def test_only_the_product_of_b_and_c_matters(implementation, arguments):
    run = run_of(implementation)
    moved = {"b": 2.0**20 * arguments["b"], "c": 2.0**-20 * arguments["c"]}
    assert_equal(run(**arguments | moved), run(**arguments))


@EVERY
def test_no_tokens(implementation, arguments):
    none = {n: a[:, :0] if n in TIME_ARGUMENTS else a for n, a in arguments.items()}
    out = dplr_delta_rule(**none, implementation=implementation)
    assert out.y is not None and out.y.shape == (2, 0, 3, 4)
    assert_equal(out.state, arguments["initial_state"])


def test_a_packed_document_is_a_call_of_its_own(arguments):
    """By the reference: every document but the first starts empty; what comes out at the end is the last one's."""
    run, start = run_of("reference"), arguments["initial_state"]
    parts = [{n: arguments[n][:, at : at + 11] for n in TIME_ARGUMENTS} for at in (0, 11, 22)]
    packed = run(**arguments, segment_ids=jnp.tile(jnp.arange(33) // 11, (2, 1)))
    alone = [run(**part, initial_state=start if n == 0 else 0 * start) for n, part in enumerate(parts)]
    assert_close(tuple(packed), (jnp.concatenate([out.y for out in alone], axis=1), alone[-1].state))


def test_linear_in_state_and_write(arguments):
    run = run_of("xla")
    doubled = {n: 2 * arguments[n] for n in ("u", "initial_state")}
    assert_equal(run(**arguments | doubled), jax.tree.map(lambda x: 2 * x, run(**arguments)))


def test_gradient_under_vmap_scan_and_remat(arguments):
    """Calls without batch and heads, a chain of them in a rematerialised scan, mapped over: one long call each."""

    def loop(one):
        out = call("reference")(
            **{n: a[None, :, None] if n in TIME_ARGUMENTS else a[None, None] for n, a in one.items()}
        )
        return jnp.sum(jnp.sin(out.y)) + jnp.sum(jnp.sin(out.state))

    def chain(one):
        def step(state, chunk):
            chunk = {n: a[None, :, None] for n, a in chunk.items()}
            out = call(block_t=8)(**chunk, initial_state=state)
            return out.state, jnp.sum(jnp.sin(out.y))

        chunks = {n: one[n].reshape(2, 16, *one[n].shape[1:]) for n in TIME_ARGUMENTS}
        end, reads = jax.lax.scan(jax.checkpoint(step), one["initial_state"][None, None], chunks)
        return jnp.sum(reads) + jnp.sum(jnp.sin(end))

    heads = {n: a[0, :32].swapaxes(0, 1) if n in TIME_ARGUMENTS else a[0] for n, a in arguments.items()}
    one_by_one = jit(jax.grad(loop))
    expected = [one_by_one({n: a[i] for n, a in heads.items()}) for i in range(3)]
    assert_close(jit(jax.vmap(jax.grad(chain)))(heads), jax.tree.map(lambda *x: jnp.stack(x), *expected))


def test_a_policy_can_keep_the_states_by_name(capsys):
    def kept(policy):
        run = jax.checkpoint(call(block_t=16), policy=policy)
        print_saved_residuals(lambda a: jnp.sum(run(**a).y), make_arguments(ArgSpec(1, 64, 2, 4, 3)))
        return [line.split()[0] for line in capsys.readouterr().out.splitlines() if "argument" not in line]

    states = "f32[4,1,2,4,3]"
    assert states in kept(jax.checkpoint_policies.save_only_these_names("dplr_delta_rule_states"))
    assert states not in kept(jax.checkpoint_policies.nothing_saveable)


@pytest.mark.slow
def test_memory_of_the_gradient_grows_linearly():
    """Four times the tokens, at most about four times the temporaries; one state per token would be far above."""

    def temporaries(tokens):
        case = bench.OP.shapes(ArgSpec(1, tokens, 2, 32, 32))
        analysis = jit(bench.function("xla", "forward+gradients", 32)).lower(case).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    short, long = temporaries(512), temporaries(2048)
    inputs, states = 2 * 2048 * 6 * 32 * 4, 2 * (2048 // 32) * 32 * 32 * 4
    assert long <= 4.5 * short
    assert long <= 4 * (inputs + states)


@pytest.mark.parametrize("name", ["api", "step"])
def test_examples(name):
    result = doctest.testmod(importlib.import_module(f"hope_kernels.dplr_delta_rule.{name}"))
    assert result.attempted > 0 and result.failed == 0


def test_the_benchmark_measures_it():
    spec = ArgSpec(1, 6, 1, 3, 2, documents=2)
    rows = measure(bench.OP, "tiny", "forward", ("reference", "xla"), None, spec=spec, repeats=1)
    assert [(row.implementation, row.chosen, row.tokens) for row in rows] == [("reference", False, 6), ("xla", True, 6)]
    assert (
        bench.cost(ARG_SPECS["short"], "forward+gradients").flops > 3 * bench.cost(ARG_SPECS["short"], "forward").flops
    )
    assert bench.resize(spec, 9, 5) == ArgSpec(1, 9, 1, 5, 5, documents=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": jnp.zeros((3, 2, 4))}, r"k must be .*\(3, 2, 4\)"),
        ({"u": jnp.zeros((2, 33, 2, 4))}, r"u must be .*\(2, 33, 3, 6\); got \(2, 33, 2, 4\)"),
        ({"q": jnp.zeros((2, 33, 3, 5))}, r"q must have shape \(2, 33, 3, 6\) .*\(2, 33, 3, 5\)"),
        ({"b": jnp.zeros((2, 33, 3))}, r"b must have shape .*\(2, 33, 3\)"),
        ({"c": jnp.zeros((2, 33, 3))}, r"c must have shape .*\(2, 33, 3\)"),
        ({"log_alpha": jnp.zeros((2, 33, 3))}, r"log_alpha must have shape \(2, 33, 3, 6\).*\(2, 33, 3\)"),
        ({"initial_state": jnp.zeros((2, 3, 4, 6))}, r"initial_state must have shape \(2, 3, 6, 4\)"),
        ({"mask": jnp.zeros((2, 33), bool)}, r"mask must have shape .*\(2, 33\)"),
        ({"segment_ids": jnp.zeros((33, 2), int)}, r"segment_ids must have shape \(2, 33\)"),
        ({"read": "start"}, "before, after; got 'start'"),
        ({"block_t": 0}, "at least 1; got 0"),
        ({"implementation": "pallas_tpu"}, "no implementation 'pallas_tpu'; there are: xla, reference"),
    ],
)
def test_values(arguments, changes, message):
    with pytest.raises(ValueError, match=message):
        dplr_delta_rule(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"c": jnp.zeros((2, 33, 3, 6), jnp.int32)}, "c must be floating point; got int32"),
        ({"mask": jnp.zeros((2, 33, 3))}, "mask must be bool.*float32"),
        ({"segment_ids": jnp.zeros((2, 33))}, "segment_ids must be integers; got float32"),
    ],
)
def test_types(arguments, changes, message):
    with pytest.raises(TypeError, match=message):
        dplr_delta_rule(**{**arguments, **changes})
