"""Whole chunks of `titans_lmm` through `hope_kernels.mlp_memory` are what the nest's general path computes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax import Tokens, dgd, l2_regression, level, mlp_memory, nest, titans_lmm
from hope_kernels import explain
from tests.oracles import assert_close, compiled, float64

K, F, C, T = 5, 6, 4, 18
RULE = dgd(exact=False, decay=False, momentum="gate")


def general(memory, read: Any = "start", momentum=True):
    """The same nest without the op."""
    rule = RULE if momentum else dgd(exact=False, decay=False)
    return nest(level(memory, rule, C, objective=l2_regression, read=read))


def tokens(rng, length=T, heads=(), **changes) -> Any:
    gate = lambda low, high: rng.uniform(low, high, (length, *heads))  # noqa: E731
    key, value, query = rng.normal(size=(3, length, *heads, K)) / K**0.5
    return Tokens(key, value, query, gate(0.05, 0.2), gate(0.6, 1.0), gate(0.1, 0.5))._replace(**changes)


def weights(memory, heads=()):
    init = memory.init
    for _ in heads:
        init = jax.vmap(init)
    return float64(init(jax.random.split(jax.random.key(0), heads) if heads else jax.random.key(0)))


CASES: dict[str, dict[str, Any]] = {
    "start": {},
    "before": {"read": "before"},
    "after, no residual": {"read": "after", "residual": False},
    "no momentum, heads": {"momentum": False, "heads": (2, 3)},
    "heads, gates for all of them": {"heads": (3,), "common": True},
    "masked": {"masked": True},
}


SLOW = ("before", "masked", "heads, gates for all of them")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES])
def test_the_op_is_the_general_path(name, x64, rng):
    """Reads, state and gradients, for a call that begins and ends inside a chunk."""
    case: dict[str, Any] = {
        "read": "start",
        "residual": True,
        "momentum": True,
        "heads": (),
        "common": False,
        "masked": False,
    }
    case |= CASES[name]
    memory = mlp_memory(K, F, residual=case["residual"])
    xs = tokens(rng, heads=case["heads"])
    if case["common"]:
        xs = xs._replace(eta=xs.eta[:, 0], alpha=None, log_alpha=np.log(xs.alpha[:, 0]), mu=xs.mu[:, 0])
    if case["masked"]:
        xs = xs._replace(mask=rng.uniform(size=T) < 0.7)
    start = weights(memory, case["heads"])
    nests = (
        titans_lmm(memory, C, read=case["read"], momentum=case["momentum"]),
        general(memory, case["read"], case["momentum"]),
    )

    def run(n):
        def loss(start, xs):
            state, first = n.apply(n.init((start,)), jax.tree.map(lambda x: x[:3], xs), phase=0)
            state, rest = n.apply(state, jax.tree.map(lambda x: x[3:], xs), phase=3)
            y = jnp.concatenate([first, rest])
            return jnp.sum(jnp.sin(y)) + sum(jnp.sum(w**2) for w in jax.tree.leaves(state.levels)), (state, y)

        return compiled(jax.value_and_grad(loss, has_aux=True, allow_int=True))(start, xs)

    assert_close(run(nests[0]), run(nests[1]))


def test_which_calls_use_the_op(rng):
    """Known whole chunks do; less than a chunk does not."""
    n, xs = titans_lmm(mlp_memory(K, F), C), jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tokens(rng))
    state = n.init((mlp_memory(K, F).init(jax.random.key(0)),))
    short = jax.tree.map(lambda x: x[:3], xs)
    assert "mlp_memory: 'xla' runs" in explain(n.apply, state, xs, phase=0)
    assert "mlp_memory" not in explain(n.apply, state, short, phase=0)
    assert "mlp_memory" not in explain(general(mlp_memory(K, F)).apply, state, xs, phase=0)


def test_gates_that_are_missing(rng):
    n = titans_lmm(mlp_memory(K, F), C)
    state = n.init((mlp_memory(K, F).init(jax.random.key(0)),))
    with pytest.raises(ValueError, match=r"needs the gate eta; the Tokens have \['alpha', 'mu'\]"):
        n.apply(state, tokens(rng, eta=None))
    with pytest.raises(ValueError, match=r"needs the gate mu; the Tokens have \['alpha', 'eta'\]"):
        n.apply(state, tokens(rng, mu=None))


def test_dtypes_stay(rng):
    memory = mlp_memory(K, F)
    n = titans_lmm(memory, C)
    state = n.init((jax.tree.map(lambda w: w.astype(jnp.bfloat16), memory.init(jax.random.key(0))),))
    after, _ = n.apply(state, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tokens(rng)))
    types = lambda tree: [w.dtype for w in jax.tree.leaves(tree.levels)]  # noqa: E731
    assert types(after) == types(state)


def test_a_nest_of_several_levels_refuses_whole_chunks():
    lev = level(mlp_memory(K, F), RULE, C, objective=l2_regression)
    with pytest.raises(ValueError, match="one level; got 2"):
        nest(lev, lev, whole=lambda state, xs: (state, xs))


def test_memory_of_the_gradient(rng):
    """Fewer temporaries than the general path, which keeps what every chunk computed."""
    memory = mlp_memory(16, 16)
    arguments = jax.eval_shape(lambda: (memory.init(jax.random.key(0)), *[jnp.zeros((512, 16))] * 3, jnp.zeros((512,))))

    def temporaries(n):
        def loss(params, q, k, v, gate):
            return jnp.sum(n.apply(n.init((params,)), Tokens(k, v, q, gate, gate, gate), phase=0)[1] ** 2)

        program: Any = jax.jit(jax.grad(loss)).lower(*arguments).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(titans_lmm(memory, C)) < temporaries(general(memory)) / 3
