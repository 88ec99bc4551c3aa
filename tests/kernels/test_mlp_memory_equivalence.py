"""Every implementation equals the reference: reads, weights, momenta and every gradient; the reference a NumPy loop."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_kernels import mlp_memory
from hope_kernels.mlp_memory import IMPLEMENTATIONS
from hope_kernels.mlp_memory.arg_specs import TITANS, ArgSpec, make_arguments
from hope_kernels.testing import FAST_COMPILE, check_op, with_poisoned_tail
from tests.oracles import TIGHT, mlp_factors, mlp_read, numpy64, proximal, write

SPEC = ArgSpec(batch=2, tokens=13, heads=2, width=5, hidden=6, chunk_size=4)
TIME_ARGUMENTS = ("q", "k", "v", "eta", "log_alpha", "log_mu")
OTHERS = pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "reference"])

RULES: dict[str, dict[str, Any]] = {
    "input": {},
    "layerwise, read before": {"rule": "layerwise", "read": "before"},
    "Titans, read after": {**TITANS, "read": "after"},
    "plain, own steps": {"rule": "layerwise", "decay": False},
    "clipped": {"error_clip": 0.5},
    "clipped dot product, no residual": {"objective": "dot_product", "error_clip": 0.5, "residual": False},
}


def numpy_loop(arguments, *, chunk_size, rule="input", decay=True, exact=True, objective="l2", error_clip=None,
               residual=True, read="start"):  # fmt: skip
    """Spec 2.3 and (S7.4) to (S7.7), one example, one head and one token at a time."""
    a = numpy64(arguments)
    batch, tokens, heads, _ = a["k"].shape
    y, end = np.zeros_like(a["q"]), {n: np.zeros_like(a[n]) for n in ("w1", "w2", "momentum1", "momentum2")}
    for b in range(batch):
        for h in range(heads):
            running = {n: a[n][b, h] for n in ("w1", "w2")}
            z = {n: a[n.replace("w", "momentum")][b, h] for n in running}
            start = running
            for t in range(tokens):
                start = dict(running) if t % chunk_size == 0 else start
                before = dict(running)
                q, k, v, eta = (a[n][b, t, h] for n in ("q", "k", "v", "eta"))
                e = -v if objective == "dot_product" else mlp_read(start, k, residual) - v
                if error_clip is not None:
                    e = e * min(1.0, error_clip / np.linalg.norm(e))
                for n, (key, delta) in mlp_factors(start, k, e).items():
                    own = key if rule == "layerwise" else k
                    step = proximal(eta, own) if exact else eta
                    erase = step if decay and (n == "w2" or rule == "layerwise") else 0.0
                    alpha, mu = np.exp(a["log_alpha"][b, t, h]), np.exp(a["log_mu"][b, t, h])
                    running[n], z[n] = write(running[n], z[n], key, -step * delta, erase, alpha, mu)
                y[b, t, h] = mlp_read({"start": start, "before": before, "after": running}[read], q, residual)
            for n in running:
                end[n][b, h], end[n.replace("w", "momentum")][b, h] = running[n], z[n]
    return y, end["w1"], end["w2"], end["momentum1"], end["momentum2"]


def check(implementation, arguments, *, chunk_size=4, poison=0, reduction=0, fully_compiled=False, **static):
    """`check_op` on `mlp_memory`; `poison` adds that many masked tokens of NaN behind the last one."""

    def op(**arrays):
        return tuple(mlp_memory(**arrays, chunk_size=chunk_size, implementation=implementation, **static))

    def reference(**arrays):
        return tuple(mlp_memory(**arrays, chunk_size=chunk_size, implementation="reference", **static))

    poisoned = with_poisoned_tail(op, extra=poison, time_arguments=TIME_ARGUMENTS, finite=("q",))
    return check_op(
        poisoned if poison else op,
        reference,
        arguments,
        length=arguments["k"].shape[1] + arguments["w2"].shape[3] + reduction,
        compiler_options=None if fully_compiled else FAST_COMPILE,
    )


@pytest.mark.parametrize("name", RULES)
def test_the_reference_is_the_loop(name, x64):
    """Inner gradients by `jax.grad` there, by hand here."""
    arguments = make_arguments(SPEC._replace(dtype="float64"))
    op = partial(mlp_memory, implementation="reference", chunk_size=4, **RULES[name])
    found = jax.jit(op, compiler_options=FAST_COMPILE)(**arguments)
    for x, y in zip(found, numpy_loop(arguments, chunk_size=4, **RULES[name]), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=TIGHT)


@OTHERS
@pytest.mark.parametrize("name", RULES)
def test_rules_in_float64(x64, implementation, name):
    check(implementation, make_arguments(SPEC._replace(dtype="float64")), **RULES[name])


@OTHERS
@pytest.mark.parametrize(("tokens", "chunk_size"), [(1, 4), (8, 4), (7, 1), (9, 16)])
def test_lengths_and_clocks_in_float64(x64, implementation, tokens, chunk_size):
    """One token, whole chunks, a clock of one token, and less than a chunk."""
    arguments = make_arguments(SPEC._replace(tokens=tokens, dtype="float64"))
    check(implementation, arguments, chunk_size=chunk_size)


@OTHERS
def test_float32_at_the_size_of_a_layer(implementation):
    spec = ArgSpec(1, 80, 1, 32, 32, 16)
    check(implementation, make_arguments(spec), chunk_size=16, fully_compiled=True)


@OTHERS
@pytest.mark.parametrize(("decay", "momentum"), [(False, False), (True, False), (False, True)])
def test_absent_gates(implementation, decay, momentum):
    check(implementation, make_arguments(SPEC._replace(decay=decay, momentum=momentum)))


@OTHERS
def test_weights_only(implementation):
    arguments = make_arguments(SPEC)
    del arguments["q"]
    check(implementation, arguments, q=None)


@OTHERS
@pytest.mark.parametrize(("read", "momentum"), [("start", False), ("before", True)])
def test_masked_tokens(rng, implementation, read, momentum):
    arguments = make_arguments(SPEC._replace(momentum=momentum))
    arguments["mask"] = jnp.asarray(rng.uniform(size=(2, 13, 2)) < 0.6)
    check(implementation, arguments, read=read)


@OTHERS
@pytest.mark.parametrize("momentum", [False, True])
def test_nothing_leaks_from_a_poisoned_tail(implementation, momentum):
    check(implementation, make_arguments(SPEC._replace(momentum=momentum)), poison=6, error_clip=0.5)


@OTHERS
def test_bfloat16_inputs(implementation):
    spec = ArgSpec(1, 40, 2, 32, 32, 8, dtype="bfloat16")
    arguments = make_arguments(spec)
    out = jax.eval_shape(partial(mlp_memory, implementation=implementation, chunk_size=8), **arguments)
    assert (out.y.dtype, out.w1.dtype, out.momentum2.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    check(implementation, arguments, chunk_size=8)
