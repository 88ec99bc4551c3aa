"""The GPU kernels against the token loop in float64: simulated on a CPU, and with the marker `gpu` on a GPU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_kernels import Config, delta_rule, delta_rule_sharded, explain
from hope_kernels.delta_rule.arg_specs import ArgSpec, make_arguments
from hope_kernels.delta_rule.pallas_gpu import choose
from hope_kernels.testing import relative_error
from tests.kernels.cases import (
    BOUNDS,
    CASES,
    arguments_of,
    calls_of,
    check_against_oracle,
    gate_cosine,
    zero_cotangent_gradients,
)

pytest.importorskip("absl", reason="jax's Mosaic GPU needs absl-py")

# Two tiles of which the second is half full.
SPEC = ArgSpec(batch=1, tokens=100, heads=1, key_width=64, value_width=64, dtype="bfloat16")
SIMULATED = Config(interpret=True)
WHERE = [pytest.param(SIMULATED, id="simulated"), pytest.param(Config(), id="gpu", marks=pytest.mark.gpu)]
FAST = ("identical keys", "masked stretch", "documents")


def how(config: Config) -> dict[str, Any]:
    return {"implementation": "pallas_gpu", "config": config}


def few_heads(arguments, key_heads):
    for name in ("q", "k"):
        arguments[name] = arguments[name][:, :, :key_heads]
    return arguments


@pytest.mark.parametrize("config", WHERE)
@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in FAST else pytest.mark.slow) for c in CASES])
def test_hard_cases(case, config):
    check_against_oracle(arguments_of(case, SPEC), **how(config))


@pytest.mark.parametrize("config", WHERE)
def test_reads_before_the_write(config):
    check_against_oracle(arguments_of("documents", SPEC), read="before", **how(config))


@pytest.mark.parametrize("config", WHERE)
@pytest.mark.parametrize(
    ("erase", "decay"), [(False, True), (True, False), pytest.param(False, False, marks=pytest.mark.slow)]
)
def test_absent_gates(erase, decay, config):
    check_against_oracle(make_arguments(SPEC._replace(erase=erase, decay=decay)), **how(config))


@pytest.mark.parametrize("config", WHERE)
@pytest.mark.parametrize("erase", [False, True])
def test_state_only(erase, config):
    arguments = make_arguments(SPEC._replace(erase=erase))
    del arguments["q"]

    def loss(arguments, **how):
        return jnp.sum(delta_rule(None, **arguments, **how).state ** 2)

    found = jax.jit(jax.grad(partial(loss, **how(config))))(arguments)
    expected = jax.jit(jax.grad(partial(loss, implementation="reference")))(arguments)
    for name, gradient in found.items():
        # The cotangent is the state itself: it is off once, and once more what it is multiplied with.
        assert relative_error(gradient, expected[name]) < 2 * BOUNDS["bfloat16"], name


@pytest.mark.parametrize("config", WHERE)
@pytest.mark.parametrize(
    "sizes",
    [
        {"key_width": 128, "value_width": 128},
        pytest.param({"key_width": 64, "value_width": 320}, marks=pytest.mark.slow),
        pytest.param({"key_width": 256, "value_width": 64}, marks=pytest.mark.slow),
        pytest.param({"key_width": 256, "value_width": 256}, marks=pytest.mark.slow),
    ],
)
def test_widths(sizes, config):
    check_against_oracle(arguments_of("documents", SPEC._replace(**sizes)), **how(config))


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(Config(interpret=True, segments=2), id="simulated"),
        pytest.param(Config(segments=2), id="gpu", marks=pytest.mark.gpu),
    ],
)
def test_segments_side_by_side(config):
    check_against_oracle(arguments_of("documents", SPEC), **how(config))


@pytest.mark.slow
@pytest.mark.parametrize("config", WHERE)
def test_two_warpgroups_per_block(config, monkeypatch):
    monkeypatch.setattr(choose, "PROCESSORS", 1)
    spec = SPEC._replace(heads=2, key_width=64, value_width=128, tokens=200)
    check_against_oracle(few_heads(make_arguments(spec), 1), **how(config))


@pytest.mark.slow
@pytest.mark.parametrize("config", WHERE)
def test_high_precision_solves_the_system_in_three_passes(config):
    """Then the rounding of the inverse no longer shows in the state, where nearly parallel keys let it show most."""
    errors = check_against_oracle(arguments_of("correlated keys", SPEC), **how(config), precision="high")
    assert errors["state"] < BOUNDS["bfloat16"] / 10


@pytest.mark.slow
@pytest.mark.parametrize("config", WHERE)
def test_value_heads_share_keys(config):
    arguments = few_heads(make_arguments(SPEC._replace(batch=2, heads=4, tokens=20)), 2)
    check_against_oracle(arguments, **how(config))


@pytest.mark.parametrize("config", WHERE)
def test_zero_cotangents_give_zero_gradients(config):
    gradients = zero_cotangent_gradients(arguments_of("random", SPEC), **how(config))
    assert len(gradients) == 6 and max(gradients.values()) == 0


@pytest.mark.parametrize("config", WHERE)
@pytest.mark.parametrize("precision", ["default", pytest.param("fast", marks=pytest.mark.slow)])
def test_gradients_of_gate_parameters_point_the_right_way(precision, config):
    assert gate_cosine(arguments_of("correlated keys", SPEC), **how(config), precision=precision) >= 0.999


def test_no_races_and_no_uninitialised_memory():
    """Every output is written, and no warpgroup reads what another may still be writing."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import mosaic_gpu as plgpu

    simulated = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    check_against_oracle(make_arguments(SPEC._replace(tokens=200)), **how(Config(interpret=simulated)))
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.slow
@pytest.mark.parametrize("config", WHERE)
def test_vmap_is_a_loop(config):
    arguments = make_arguments(SPEC._replace(tokens=16))
    weight = jnp.asarray(np.random.default_rng(4).normal(size=arguments["u"].shape), jnp.float32)

    def loss(arguments):
        out: Any = delta_rule(**arguments, **how(config))
        return jnp.sum(weight * out.y.astype(jnp.float32)) + jnp.sum(out.state)

    stacked = jax.tree.map(lambda x: jnp.stack([x, x / 2]), arguments)
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(stacked)
    for i in (0, 1):
        alone = jax.jit(jax.grad(loss))(jax.tree.map(lambda x, i=i: x[i], stacked))
        for name, gradient in alone.items():
            np.testing.assert_array_equal(np.asarray(mapped[name][i]), np.asarray(gradient), err_msg=name)


def test_on_a_mesh():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    arguments = make_arguments(SPEC._replace(tokens=16))
    run = partial(delta_rule_sharded, mesh=mesh, batch="data", **how(SIMULATED))
    found = jax.jit(lambda a: run(**a))(arguments)
    expected = jax.jit(lambda a: delta_rule(**a, **how(SIMULATED)))(arguments)
    np.testing.assert_array_equal(np.asarray(found.state), np.asarray(expected.state))


def test_policies_choose_what_is_kept(monkeypatch):
    """Saving what has a name leaves only the two backward kernels to the backward pass; traced, not run."""
    monkeypatch.setattr(choose, "_wrong_machine", lambda device: None)
    arguments = make_arguments(SPEC)
    names = ("delta_rule_states", "delta_rule_inverse")

    def loss(policy, arguments):
        def run(arguments):
            out: Any = delta_rule(**arguments, **how(Config()))
            return out.y

        return jnp.sum(jax.checkpoint(run, policy=policy)(arguments).astype(jnp.float32))

    saved, recomputed = (
        len(calls_of("mpmd_map", jax.grad(partial(loss, policy)), arguments))
        for policy in (
            jax.checkpoint_policies.save_only_these_names(*names),
            jax.checkpoint_policies.nothing_saveable,
        )
    )
    assert (saved, recomputed) == (4, 6)


def refusal(config=SIMULATED, precision: Any = "default", **changes):
    arguments = jax.eval_shape(lambda: make_arguments(SPEC._replace(**changes)))
    with pytest.raises(NotImplementedError) as error:
        jax.eval_shape(lambda a: delta_rule(**a, **how(config), precision=precision), arguments)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": True}, "momentum (log_mu)"),
        ({"dtype": "float32"}, "not float32"),
        ({"key_width": 96}, "(64, 128, 256), not 96"),
        ({"value_width": 96}, "multiples of 64, not 96"),
        ({"config": Config(block_t=32, interpret=True)}, "block_t=32"),
        ({"precision": "high", "key_width": 256}, "precision='high' with keys of width 256"),
    ],
)
def test_what_cannot_run_says_why(changes, message):
    assert message in refusal(**changes)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a machine without a GPU answers")
def test_a_machine_without_a_gpu_is_refused():
    assert "needs an NVIDIA GPU" in refusal(config=Config())


def test_never_chosen_before_it_ran(monkeypatch):
    """Not even on a machine where it can run."""
    monkeypatch.setattr(choose, "_wrong_machine", lambda device: None)
    chosen = explain(delta_rule, **make_arguments(SPEC))
    assert chosen.startswith("delta_rule: 'xla' runs") and "'pallas_gpu' was not chosen: it has only been" in chosen
