"""The TPU kernels, simulated on a CPU, against the token loop in float64."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from hope_kernels import Config, delta_rule, delta_rule_sharded
from hope_kernels.delta_rule.arg_specs import ArgSpec, make_arguments
from hope_kernels.delta_rule.pallas_tpu import choose
from hope_kernels.delta_rule.pallas_tpu.inverse import unit_lower_inverse
from hope_kernels.delta_rule.types import Inputs
from hope_kernels.testing import FAST_COMPILE, relative_error, tolerance
from tests.kernels.cases import (
    BOUNDS,
    CASES,
    arguments_of,
    calls_of,
    check_against_oracle,
    gate_cosine,
    zero_cotangent_gradients,
)

# Three tiles of which the last is half full; one stream per grid cell, which compiles quickest.
SPEC = ArgSpec(batch=2, tokens=40, heads=1, key_width=64, value_width=64)
CONFIG = Config(block_t=16, heads=1, group=1, interpret=True)
HOW: dict[str, Any] = {"implementation": "pallas_tpu", "config": CONFIG}


def everything(**how):
    """A function of arguments and cotangents: outputs and gradients."""

    def run(arguments, cotangents):
        out, pullback = jax.vjp(lambda a: tuple(delta_rule(**a, **how))[:2], arguments)
        return out, pullback(cotangents)[0]

    return run


def compiled(function):
    return jax.jit(function, compiler_options=FAST_COMPILE)


def cotangents_of(arguments, seed=4):
    out = jax.eval_shape(lambda a: tuple(delta_rule(**a))[:2], arguments)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), out)


def assert_close(found, expected):
    """Two float32 ways to the same sums over tokens and widths."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(x, y) <= tolerance("float32", SPEC.tokens + SPEC.key_width)


def case_params():
    fast = {("float32", c) for c in ("identical keys", "forgets everything", "masked stretch", "documents")}
    fast |= {("bfloat16", "random"), ("bfloat16", "correlated keys")}
    for dtype in BOUNDS:
        for case in CASES:
            yield pytest.param(dtype, case, marks=[] if (dtype, case) in fast else pytest.mark.slow)


@pytest.mark.parametrize(("dtype", "case"), list(case_params()))
def test_hard_cases(dtype, case):
    check_against_oracle(arguments_of(case, SPEC._replace(dtype=dtype)), **HOW)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "case"), [(d, c) for d in BOUNDS for c in CASES])
def test_hard_cases_in_the_tile_of_a_chip(dtype, case):
    spec = ArgSpec(batch=1, tokens=300, heads=2, key_width=128, value_width=128, dtype=dtype)
    how = {**HOW, "config": Config(block_t=128, heads=2, group=2, interpret=True)}
    check_against_oracle(arguments_of(case, spec), **how)


@pytest.mark.parametrize("case", ["random", "documents"])
def test_reads_before_the_write(case):
    check_against_oracle(arguments_of(case, SPEC), read="before", **HOW)


@pytest.mark.parametrize(("erase", "decay"), [(False, True), (True, False), (False, False)])
def test_absent_gates(erase, decay):
    check_against_oracle(make_arguments(SPEC._replace(erase=erase, decay=decay)), **HOW)


@pytest.mark.parametrize("erase", [False, True])
def test_state_only(erase):
    arguments = make_arguments(SPEC._replace(erase=erase))
    del arguments["q"]

    def loss(arguments, **how):
        return jnp.sum(delta_rule(None, **arguments, **how).state ** 2)

    found = compiled(jax.grad(partial(loss, **HOW)))(arguments)
    expected = jax.jit(jax.grad(partial(loss, implementation="reference")))(arguments)
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) < BOUNDS["float32"], name


@pytest.mark.parametrize(
    ("heads", "key_heads", "config"),
    [
        (4, 2, replace(CONFIG, heads=4, group=2)),  # two key heads with two value heads each, one cell
        (4, 1, replace(CONFIG, heads=2, group=2)),  # one key head for two cells
        (2, 2, replace(CONFIG, heads=4, group=4)),  # two batch entries share a cell
    ],
)
def test_streams_share_cells_and_keys(heads, key_heads, config):
    spec = SPEC._replace(heads=heads, tokens=20)
    arguments = make_arguments(spec)
    for name in ("q", "k"):
        arguments[name] = arguments[name][:, :, :key_heads]
    check_against_oracle(arguments, implementation="pallas_tpu", config=config)


def test_memories_side_by_side():
    """Five writes along V share one triangular inverse."""
    check_against_oracle(make_arguments(SPEC._replace(tokens=17, value_width=5 * 64)), **HOW)


def test_zero_cotangents_give_zero_gradients():
    gradients = zero_cotangent_gradients(arguments_of("random", SPEC), **HOW)
    assert len(gradients) == 6 and max(gradients.values()) == 0


@pytest.mark.parametrize("precision", ["default", "fast"])
def test_gradients_of_gate_parameters_point_the_right_way(precision):
    arguments = arguments_of("correlated keys", SPEC._replace(dtype="bfloat16"))
    assert gate_cosine(arguments, **HOW, precision=precision) >= 0.999


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["default", "high", "fast"])
def test_gradients_of_gate_parameters_in_the_tile_of_a_chip(precision):
    spec = ArgSpec(batch=1, tokens=512, heads=2, key_width=64, value_width=64, dtype="bfloat16")
    config = Config(block_t=128, heads=2, group=2, interpret=True)
    arguments = arguments_of("correlated keys", spec)
    assert gate_cosine(arguments, implementation="pallas_tpu", config=config, precision=precision) >= 0.999


def test_high_precision_inverts_in_three_passes():
    """Two roundings between dW and dU by default: of the inverse and of the result; with "high" only the latter."""
    arguments = arguments_of("correlated keys", SPEC._replace(tokens=32, dtype="bfloat16"))
    config = replace(CONFIG, block_t=32)
    errors = {
        p: check_against_oracle(arguments, implementation="pallas_tpu", config=config, precision=p)["d u"]
        for p in ("default", "high")
    }
    assert errors["high"] < errors["default"]


def test_no_races_and_no_uninitialised_memory():
    arguments = make_arguments(SPEC._replace(tokens=20))
    cotangents = cotangents_of(arguments)
    simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
    try:
        run = compiled(everything(implementation="pallas_tpu", config=replace(CONFIG, interpret=simulated)))
        found = run(arguments, cotangents)
        jax.block_until_ready(found)
        assert interpret_pallas_call.races is not None
        assert not interpret_pallas_call.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    expected = compiled(everything(**HOW))(arguments, cotangents)
    assert_close(found, expected)


def test_vmap_is_a_loop():
    arguments = make_arguments(SPEC._replace(batch=2, tokens=16))
    cotangents = cotangents_of(arguments)
    run = everything(**HOW)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), (arguments, cotangents))
    mapped = compiled(jax.vmap(run))(*stacked)
    single = compiled(run)
    parts = [single(*jax.tree.map(lambda x, i=i: x[i], stacked)) for i in (0, 1)]
    looped = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    assert_close(mapped, looped)


def test_vmap_fills_the_cells():
    """8 examples of 2 heads: one cell of 16 streams, in both kernels."""
    arguments = make_arguments(SPEC._replace(batch=1, heads=2, tokens=16))
    arguments = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *x.shape)), arguments)
    run = everything(**HOW | {"config": Config(block_t=16, interpret=True)})
    calls = calls_of("pallas_call", jax.vmap(run), arguments, jax.vmap(cotangents_of)(arguments))
    assert [call.params["grid_mapping"].grid for call in calls] == [(1, 1, 1)] * 2


def test_what_is_kept_for_the_gradient():
    """Nothing without a gradient; with one the states and inverses."""
    arguments = make_arguments(SPEC)

    def loss(arguments):
        out: Any = delta_rule(**arguments, **HOW)
        return out.y.sum()

    forward, backward = "delta_rule_forward", "delta_rule_backward"

    def kernels(function):
        calls = calls_of("pallas_call", function, arguments)
        return [(call.params["name"], len(call.outvars)) for call in calls]

    assert kernels(loss) == [(forward, 2)]
    assert kernels(jax.grad(loss)) == [(forward, 4), (backward, 5)]


def test_on_a_mesh():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    arguments = make_arguments(SPEC._replace(heads=2, tokens=16))
    how: dict[str, Any] = {**HOW, "config": replace(CONFIG, heads=1)}

    def loss(arguments):
        out: Any = delta_rule_sharded(mesh=mesh, batch="data", heads="tensor", **arguments, **how)
        return jnp.sum(out.y**2) + jnp.sum(out.state**2)

    def whole(arguments):
        out: Any = delta_rule(**arguments, implementation="reference")
        return jnp.sum(out.y**2) + jnp.sum(out.state**2)

    found = compiled(jax.grad(loss))(arguments)
    expected = compiled(jax.grad(whole))(arguments)
    assert_close(found, expected)


@pytest.mark.parametrize("size", [16, 32, 128])
@pytest.mark.parametrize(("passes", "bound"), [(1, 4e-3), (3, 2e-5), (6, 1e-6)])
def test_inverse(rng, size, passes, bound):
    """bfloat16 rounds every factor by 2^-9, three passes by 2^-17; the growth is that of the inverse itself."""
    k = rng.normal(size=(2, size, 32))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    a = np.tril(rng.uniform(0, 1, (2, size, 1)) * (k @ k.transpose(0, 2, 1)), -1)
    a[1] = np.tril(np.ones((size, size)), -1)  # identical keys, erased completely: powers of it grow like binomials
    expected = np.linalg.inv(np.eye(size) + a)
    found = np.asarray(jax.jit(unit_lower_inverse, static_argnums=1)(jnp.asarray(a, jnp.float32), passes))
    for i in range(2):
        assert np.linalg.norm(found[i] - expected[i]) < bound * np.linalg.norm(expected[i])


def refusal(config=CONFIG, **changes):
    spec = SPEC._replace(**changes)
    arguments = jax.eval_shape(lambda: make_arguments(spec))
    with pytest.raises(NotImplementedError) as error:
        jax.eval_shape(lambda a: delta_rule(**a, implementation="pallas_tpu", config=config), arguments)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": True}, "momentum (log_mu)"),
        ({"dtype": "float16"}, "not float16"),
        ({"key_width": 96}, "(64, 128, 256), not 96"),
        ({"value_width": 100}, "multiples of 64, not 100"),
        ({"config": replace(CONFIG, block_t=48)}, "block_t=48"),
        ({"config": Config()}, "needs a TPU"),
        ({"value_width": 64 * 1024}, "do not fit"),
    ],
)
def test_what_cannot_run_says_why(changes, message):
    assert message in refusal(**changes)


def test_float64_is_refused(x64):
    assert "not float64" in refusal(dtype="float64")


def plan_of(batch, heads, key_heads=None, tokens=4096, width=128, value_width=128, **config):
    key_heads = key_heads or heads
    x: Any = jax.ShapeDtypeStruct
    k = x((batch, tokens, key_heads, width), jnp.bfloat16)
    u = x((batch, tokens, heads, value_width), jnp.bfloat16)
    gate = x((batch, tokens, heads), jnp.float32)
    inputs: Any = Inputs(q=k, k=k, u=u, eta=gate, log_alpha=gate, log_mu=None, mask=None, reset=None)
    return choose.plan_call(inputs, "after", Config(**config, interpret=True), "default")


@pytest.mark.parametrize(
    ("sizes", "cell"),
    [
        ({"batch": 8, "heads": 16}, (16, 1)),
        ({"batch": 8, "heads": 2}, (2, 8)),  # few heads, big batch: batch entries share a cell
        ({"batch": 3, "heads": 4}, (4, 3)),
        ({"batch": 1, "heads": 24}, (12, 1)),
        ({"batch": 1, "heads": 64, "key_heads": 16}, (16, 1)),
        ({"batch": 1, "heads": 32, "key_heads": 1}, (16, 1)),  # one key head serves two cells
        ({"batch": 4, "heads": 3, "width": 64, "value_width": 64}, (3, 4)),  # lanes: only all heads at once
    ],
)
def test_cells(sizes, cell):
    plan = plan_of(**sizes)
    assert (plan.cell_heads, plan.rows) == cell
    assert plan.heads % plan.cell_heads == 0 and plan.batch % plan.rows == 0


def test_wide_values_get_fewer_heads():
    wide = plan_of(batch=1, heads=16, value_width=6 * 128)
    assert wide.streams < plan_of(batch=1, heads=16).streams


def test_short_calls_suit_another_implementation():
    x: Any = jax.ShapeDtypeStruct((1, 63, 1, 64), jnp.float32)
    call: Any = Inputs(q=None, k=x, u=x, eta=None, log_alpha=None, log_mu=None, mask=None, reset=None)
    reason = choose.unsuited(call)
    assert reason is not None and "63" in reason
