"""A sequence cut into segments that run side by side is the uncut sequence: reads, last state, every gradient."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_kernels import Config, delta_rule
from hope_kernels.delta_rule.arg_specs import ArgSpec, make_arguments
from hope_kernels.delta_rule.pallas_gpu import choose
from hope_kernels.delta_rule.types import Inputs
from hope_kernels.testing import FAST_COMPILE, check_op
from tests.kernels.cases import arguments_of, calls_of, check_against_oracle

SPEC = ArgSpec(batch=2, tokens=33, heads=2, key_width=5, value_width=3)
SLOW = pytest.mark.slow


def check(arguments, segments, **static):
    def op(**arrays):
        config = Config(block_t=4, segments=segments)
        return tuple(delta_rule(**arrays, implementation="xla", config=config, **static))

    def reference(**arrays):
        return tuple(delta_rule(**arrays, implementation="reference", **static))

    check_op(op, reference, arguments, length=38, compiler_options=FAST_COMPILE)


@pytest.mark.parametrize(
    ("segments", "changes", "static"),
    [
        (5, {"key_heads": 1, "documents": 4}, {}),
        (3, {"momentum": True, "documents": 4}, {"read": "before"}),
        pytest.param(2, {"momentum": True}, {}, marks=SLOW),
        pytest.param(40, {}, {}, marks=SLOW),
        pytest.param(5, {"erase": False}, {"read": "start"}, marks=SLOW),
        pytest.param(5, {"decay": False}, {}, marks=SLOW),
    ],
)
def test_segments_change_nothing(segments, changes, static):
    """Shorter than a tile, several tiles, as many as tokens; the last one is not full."""
    check(make_arguments(SPEC._replace(**changes)), segments, **static)


@pytest.mark.parametrize("momentum", [False, pytest.param(True, marks=SLOW)])
def test_state_only_with_a_mask(rng, momentum):
    arguments = make_arguments(SPEC._replace(momentum=momentum))
    del arguments["q"]
    arguments["mask"] = jnp.asarray(rng.uniform(size=(2, 33, 2)) < 0.6)
    check(arguments, 4, q=None)


@SLOW
def test_many_segments_in_float64(x64):
    """A hundred segments: the maps are handed through without losing anything."""
    arguments = make_arguments(SPEC._replace(batch=1, heads=1, tokens=200, dtype="float64"))
    check(arguments, 100)


@SLOW
def test_around_a_tpu_kernel():
    arguments = arguments_of("documents", ArgSpec(batch=1, tokens=40, heads=1, key_width=64, value_width=64))
    config = Config(block_t=16, segments=2, interpret=True)
    check_against_oracle(arguments, implementation="pallas_tpu", config=config)


@SLOW
def test_vmap_is_a_loop():
    arguments = make_arguments(SPEC)

    def loss(arguments):
        out: Any = delta_rule(**arguments, implementation="xla", config=Config(segments=3))
        return jnp.sum(jnp.sin(out.y)) + jnp.sum(out.state)

    stacked = jax.tree.map(lambda x: jnp.stack([x, x / 2]), arguments)
    mapped = jax.jit(jax.vmap(jax.grad(loss)), compiler_options=FAST_COMPILE)(stacked)
    alone = jax.jit(jax.grad(loss), compiler_options=FAST_COMPILE)
    for i in (0, 1):
        for name, gradient in alone(jax.tree.map(lambda x, i=i: x[i], stacked)).items():
            np.testing.assert_allclose(mapped[name][i], gradient, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_policy_can_keep_the_states_by_name():
    """Then the backward pass does neither of the two runs over the segments again."""
    arguments = make_arguments(SPEC)

    def loss(policy, arguments):
        def run(arguments):
            out: Any = delta_rule(**arguments, implementation="xla", config=Config(block_t=4, segments=3))
            return out.y

        return jnp.sum(jnp.sin(jax.checkpoint(run, policy=policy)(arguments)))

    policies = jax.checkpoint_policies
    saved, recomputed = (
        len(calls_of("scan", jax.grad(partial(loss, policy)), arguments))
        for policy in (policies.save_only_these_names("delta_rule_states"), policies.nothing_saveable)
    )
    assert recomputed == saved + 2


def inputs(batch, tokens, heads, key_width, value_width) -> Inputs:
    k = jax.ShapeDtypeStruct((batch, tokens, heads, key_width), jnp.bfloat16)
    u = jax.ShapeDtypeStruct((batch, tokens, heads, value_width), jnp.bfloat16)
    none: dict[str, Any] = dict.fromkeys(("q", "eta", "log_alpha", "log_mu", "mask", "reset"))
    return Inputs(k=k, u=u, **none)  # pyright: ignore


@pytest.mark.parametrize(
    ("shape", "segments"),
    [
        ((1, 32768, 8, 128, 128), 8),  # 16 blocks: 132 processors hold eight of them
        ((1, 32768, 16, 128, 128), 1),  # four would cost three walks of a quarter
        ((8, 4096, 16, 128, 128), 1),
        ((1, 2048, 1, 64, 64), 1),  # four segments of eight tiles are too few as well
        ((1, 4096, 1, 64, 64), 8),
    ],
)
def test_how_many_on_a_hopper_gpu(shape, segments):
    assert choose.segments(inputs(*shape)) == segments


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="segments must be at least 1; got 0"):
        Config(segments=0)
