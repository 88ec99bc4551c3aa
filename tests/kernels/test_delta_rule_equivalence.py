"""The forms that run anywhere are the reference: reads, final state, momentum and gradients (spec tests 14-16)."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from hope_kernels import Config, delta_rule
from hope_kernels.delta_rule.arg_specs import ArgSpec, make_arguments
from hope_kernels.testing import FAST_COMPILE, check_op, with_poisoned_tail

SPEC = ArgSpec(batch=2, tokens=20, heads=2, key_width=5, value_width=3)
TIME_ARGUMENTS = ("q", "k", "u", "eta", "log_alpha", "log_mu")

pytestmark = pytest.mark.parametrize("implementation", ["xla"])


def check(implementation, arguments, *, poison=0, block_t=16, length=None, fully_compiled=False, **static):
    """`check_op` on `delta_rule`; `poison` adds that many masked tokens of NaN behind the last one."""

    def op(**arrays):
        return tuple(delta_rule(**arrays, implementation=implementation, config=Config(block_t=block_t), **static))

    def reference(**arrays):
        return tuple(delta_rule(**arrays, implementation="reference", **static))

    poisoned = with_poisoned_tail(op, extra=poison, time_arguments=TIME_ARGUMENTS, finite=("q",))
    return check_op(
        poisoned if poison else op,
        reference,
        arguments,
        length=length or arguments["k"].shape[1] + arguments["k"].shape[3],
        compiler_options=None if fully_compiled else FAST_COMPILE,
    )


SLOW = [pytest.param(t, marks=pytest.mark.slow) for t in (2, 17, 64)]


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 33, 100, *SLOW])
def test_lengths_in_float64(x64, implementation, tokens, momentum):
    check(implementation, make_arguments(SPEC._replace(tokens=tokens, momentum=momentum, dtype="float64")))


@pytest.mark.parametrize("momentum", [False, True])
def test_one_large_tile_in_float32(implementation, momentum):
    spec = SPEC._replace(batch=1, tokens=64, key_width=32, value_width=32, momentum=momentum)
    check(implementation, make_arguments(spec), block_t=64, fully_compiled=True)


@pytest.mark.parametrize(("read", "momentum"), [("start", True), ("before", False)])
def test_reads(implementation, read, momentum):
    check(implementation, make_arguments(SPEC._replace(momentum=momentum)), read=read)


@pytest.mark.parametrize(
    ("erase", "decay", "momentum"),
    [(False, False, False), (False, False, True), (False, True, True), (True, False, False)],
)
def test_absent_gates(implementation, erase, decay, momentum):
    check(implementation, make_arguments(SPEC._replace(erase=erase, decay=decay, momentum=momentum)))


@pytest.mark.parametrize("momentum", [False, True])
def test_state_only(implementation, momentum):
    arguments = make_arguments(SPEC._replace(tokens=7, momentum=momentum))
    del arguments["q"]
    check(implementation, arguments, q=None)


@pytest.mark.parametrize(("read", "momentum"), [("after", False), ("before", True)])
def test_masked_tokens(rng, implementation, read, momentum):
    arguments = make_arguments(SPEC._replace(momentum=momentum))
    arguments["mask"] = jnp.asarray(rng.uniform(size=(2, 20, 2)) < 0.6)
    check(implementation, arguments, read=read)


@pytest.mark.parametrize("momentum", [False, True])
def test_nothing_leaks_from_a_poisoned_tail(implementation, momentum):
    check(implementation, make_arguments(SPEC._replace(tokens=13, momentum=momentum)), poison=9)


@pytest.mark.parametrize(("read", "momentum"), [("start", False), ("before", True), ("before", False), ("after", True)])
def test_packed_documents(implementation, read, momentum):
    check(implementation, make_arguments(SPEC._replace(tokens=40, documents=4, momentum=momentum)), read=read)


@pytest.mark.parametrize("momentum", [False, True])
def test_grouped_heads(rng, implementation, momentum):
    arguments = make_arguments(SPEC._replace(heads=4, key_heads=2, momentum=momentum))
    arguments["mask"] = jnp.asarray(rng.uniform(size=(2, 20, 4)) < 0.6)
    check(implementation, arguments)


def test_scale_and_high_precision(implementation):
    check(implementation, make_arguments(SPEC), scale=0.3, precision="high")


def test_momentum_that_forgets_everything(x64, implementation):
    """mu = 0, given as its logarithm, with a momentum from before: the form without momentum."""
    arguments = make_arguments(SPEC._replace(momentum=True, dtype="float64"))
    arguments["log_mu"] = jnp.full_like(arguments["log_mu"], -jnp.inf)
    plain = {n: a for n, a in arguments.items() if n not in ("log_mu", "initial_momentum")}
    op = jax.jit(partial(delta_rule, implementation=implementation))
    found, expected = op(**arguments).y, op(**plain).y
    assert found is not None and expected is not None
    assert float(jnp.abs(found - expected).max()) < 1e-12


def test_strong_decay(implementation, rng):
    """log alpha down to -9 per token: finite, and the relative error of a ratio is about |L| 2^-24."""
    arguments = make_arguments(SPEC._replace(tokens=64, key_width=16, value_width=16))
    arguments["log_alpha"] = jnp.asarray(rng.uniform(-9.0, 0.0, (2, 64, 2)), jnp.float32)
    check(implementation, arguments, block_t=64, length=64 * 9, fully_compiled=True)


@pytest.mark.parametrize("eta", [0.9, 0.999])
def test_equal_keys(implementation, eta):
    """One key 128 times over: powers of the triangular matrix would reach 1e37."""
    arguments = make_arguments(SPEC._replace(batch=1, tokens=128, heads=1))
    arguments["k"] = jnp.broadcast_to(arguments["k"][:, :1], arguments["k"].shape)
    arguments["eta"] = jnp.full_like(arguments["eta"], eta)
    arguments["log_alpha"] = jnp.zeros_like(arguments["log_alpha"])
    check(implementation, arguments, block_t=128)


def test_bfloat16_inputs(implementation):
    spec = SPEC._replace(tokens=40, key_width=32, value_width=32, dtype="bfloat16")
    arguments = make_arguments(spec)
    out = jax.eval_shape(partial(delta_rule, implementation=implementation), **arguments)
    assert out.y is not None
    assert (out.y.dtype, out.state.dtype) == (jnp.bfloat16, jnp.float32)
    check(implementation, arguments)
