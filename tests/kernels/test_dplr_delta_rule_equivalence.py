"""The forms that run anywhere are the reference; the reference is the printed recurrence, the README's tile is too."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_kernels import __path__ as roots
from hope_kernels import delta_rule, dplr_delta_rule, dplr_delta_rule_step
from hope_kernels.dplr_delta_rule.arg_specs import ArgSpec, make_arguments
from hope_kernels.testing import FAST_COMPILE, check_op, relative_error, tolerance, with_poisoned_tail

SPEC = ArgSpec(batch=2, tokens=13, heads=2, key_width=5, value_width=3, dtype="float64")
TIME_ARGUMENTS = ("q", "k", "u", "b", "c", "log_alpha")


def check(arguments, *, poison=0, block_t: int | None = 4, fully_compiled=False, **static):
    """`check_op` of the XLA form; `poison` adds that many masked tokens of NaN behind the last one."""

    def op(**arrays):
        return tuple(dplr_delta_rule(**arrays, implementation="xla", block_t=block_t, **static))

    def reference(**arrays):
        return tuple(dplr_delta_rule(**arrays, implementation="reference", **static))

    poisoned = with_poisoned_tail(op, extra=poison, time_arguments=TIME_ARGUMENTS, finite=("q",))
    return check_op(
        poisoned if poison else op,
        reference,
        arguments,
        length=arguments["k"].shape[1] + arguments["k"].shape[3],
        compiler_options=None if fully_compiled else FAST_COMPILE,
    )


def loop(transition, write, arguments):
    """M_t = M_{t-1} transition(x) + write(x), y_t = M_t q_t for a token's arrays x; M [V, K] as in the papers."""
    a = {n: np.asarray(x) for n, x in arguments.items()}
    y, end = np.zeros_like(a["u"]), np.zeros_like(a["initial_state"])
    for batch, head in np.ndindex(*end.shape[:2]):
        m = a["initial_state"][batch, head].T
        for t in range(y.shape[1]):
            x = {n: a[n][batch, t, head] for n in a if n in TIME_ARGUMENTS}
            m = m @ transition(x) + write(x)
            y[batch, t, head] = m @ x["q"]
        end[batch, head] = m.T
    return y, end


RULES: dict[str, tuple[Any, Any, Any]] = {  # transition, write, and what b, c, u are for (P1)
    "(P1)": (
        lambda x: np.diag(np.exp(x["log_alpha"])) - np.outer(x["c"], x["b"]),
        lambda x: np.outer(x["u"], x["k"]),
        lambda a: {},
    ),
    "RWKV-7, with a in the place of b": (
        lambda x: np.diag(np.exp(x["log_alpha"])) - np.outer(x["c"], x["b"] * x["c"]),
        lambda x: np.outer(x["u"], x["k"]),
        lambda a: {"b": a["b"] * a["c"]},
    ),
    "Kimi delta attention, with beta the first of b": (
        lambda x: np.diag(np.exp(x["log_alpha"])) @ (np.eye(5) - x["b"][0] * np.outer(x["k"], x["k"])),
        lambda x: x["b"][0] * np.outer(x["u"], x["k"]),
        lambda a: {
            "b": a["b"][..., :1] * a["k"],
            "c": jnp.exp(a["log_alpha"]) * a["k"],
            "u": a["b"][..., :1] * a["u"],
        },
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_the_reference_is_the_printed_recurrence(x64, name):
    transition, write, translate = RULES[name]
    arguments = make_arguments(SPEC)
    found: Any = dplr_delta_rule(**arguments | translate(arguments), implementation="reference")
    for x, y in zip(found, loop(transition, write, arguments), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-13)


def test_the_readme_computes_a_tile(x64):
    readme = (Path(roots[0]) / "dplr_delta_rule" / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    scope: dict[str, Any] = {"np": np}
    exec(block, scope)
    arguments = make_arguments(SPEC)
    expected = dplr_delta_rule(**arguments, implementation="reference")
    state = np.asarray(arguments.pop("initial_state"))
    assert expected.y is not None
    for batch, head in np.ndindex(2, 2):
        one = {n: np.asarray(a)[batch, :, head] for n, a in arguments.items()}
        y, s = scope["one_tile"](**one, s=state[batch, head])
        np.testing.assert_allclose(y, expected.y[batch, :, head], atol=1e-13)
        np.testing.assert_allclose(s, expected.state[batch, head], atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "block_t", "read"), [(1, None, "after"), (13, 1, "before"), (16, 16, "before"), (70, None, "after")]
)
def test_lengths_and_tiles_in_float64(x64, tokens, block_t, read):
    """One token, tiles of one token, one tile, and several."""
    check(make_arguments(SPEC._replace(tokens=tokens)), block_t=block_t, read=read)


def test_masks_documents_and_scale_in_float64(x64, rng):
    """In tiles of a number of tokens that is no power of two."""
    arguments = make_arguments(SPEC._replace(tokens=23, documents=4))
    arguments["mask"] = jnp.asarray(rng.uniform(size=(2, 23, 2)) < 0.6)
    check(arguments, block_t=5, read="before", scale=0.3)


def test_state_only_and_nothing_leaks_from_a_poisoned_tail(x64):
    arguments = make_arguments(SPEC)
    del arguments["q"]
    check(arguments, poison=6, q=None)


@pytest.mark.slow
def test_float32_at_the_size_of_a_layer():
    check(make_arguments(ArgSpec(1, 80, 1, 64, 64)), block_t=None, fully_compiled=True)


def test_the_delta_rule_is_a_special_case(x64, rng):
    """One decay for all channels, b = eta k, c = k: equal in reads, state and all gradients."""
    arguments = {n: a for n, a in make_arguments(SPEC._replace(tokens=20)).items() if n not in ("b", "c", "log_alpha")}
    arguments["eta"] = jnp.asarray(rng.uniform(0.0, 0.9, (2, 20, 2)))
    arguments["log_alpha"] = jnp.asarray(np.log(rng.uniform(0.7, 1.0, (2, 20, 2))))

    def special(q, k, u, eta, log_alpha, initial_state):
        log_alpha = jnp.broadcast_to(log_alpha[..., None], k.shape)
        out = dplr_delta_rule(q, k, u, eta[..., None] * k, k, log_alpha, initial_state=initial_state, block_t=8)
        return tuple(out)

    check_op(
        special,
        lambda **a: tuple(delta_rule(**a, implementation="reference"))[:2],
        arguments,
        length=25,
        compiler_options=FAST_COMPILE,
    )


def test_steps_are_the_parallel_form():
    arguments = make_arguments(SPEC._replace(dtype="float32"))
    expected: Any = dplr_delta_rule(**arguments, read="before", scale=0.5, implementation="reference")
    state, reads = arguments.pop("initial_state"), []
    step = jax.jit(partial(dplr_delta_rule_step, read="before", scale=0.5))
    for t in range(SPEC.tokens):
        y, state = step(**{n: a[:, t] for n, a in arguments.items()}, state=state)
        reads.append(y)
    for x, y in zip((jnp.stack(reads, axis=1), state), expected, strict=True):
        assert relative_error(x, y) <= tolerance("float32", SPEC.tokens + SPEC.key_width)
    arguments["q"] = None
    assert step(**{n: None if a is None else a[:, 0] for n, a in arguments.items()}, state=state).y is None
