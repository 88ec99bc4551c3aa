"""Memories: what they compute, and that their factored errors are the gradient (spec 2.1, 2.3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax import Outer, contract, deep_memory, gram, l2_regression, linear_memory, lp_regression, mlp_memory
from hope_jax.types import is_outer
from hope_jax.writing import factored_errors
from tests.oracles import assert_close, float64, gelu, mlp_gradient, mlp_read, numpy64

K, F, C = 3, 5, 4
MEMORIES = {
    "linear": linear_memory(K, 2, init_scale=1.0),
    "mlp": mlp_memory(K, F, init_scale=1.0),
    "mlp_plain": mlp_memory(K, F, residual=False, init_scale=1.0),
    "deep": deep_memory((K, F, 4, 2)),
    "deep_residual": deep_memory((K, F, K), residual=True),
}


def _value_width(memory):
    return jax.eval_shape(memory.apply, jax.eval_shape(memory.init, jax.random.key(0)), jnp.zeros((1, K))).shape[-1]


@pytest.mark.parametrize("name", MEMORIES)
def test_factored_errors_contract_to_the_gradient(name, x64, rng):
    """Also with an objective whose error is not linear."""
    memory, objective = MEMORIES[name], lp_regression(3.0)
    params = float64(memory.init(jax.random.key(0)))
    key, value = rng.normal(size=(C, K)), rng.normal(size=(C, _value_width(memory)))

    def loss(params):
        return jnp.sum(objective.loss(memory.apply(params, key), value))

    y, errors = factored_errors(memory, objective, params, key, value)
    assert jax.tree.structure(errors, is_leaf=is_outer) == jax.tree.structure(params)
    assert_close(y, memory.apply(params, key))
    assert_close(jax.tree.map(contract, errors, is_leaf=is_outer), jax.grad(loss)(params))


@pytest.mark.parametrize("name, residual", [("linear", None), ("mlp", True), ("mlp_plain", False)])
def test_factored_errors_are_the_formulas_token_by_token(name, residual, x64, rng):
    memory = MEMORIES[name]
    params = float64(memory.init(jax.random.key(0)))
    p = numpy64(params)
    key, value = rng.normal(size=(C, K)), rng.normal(size=(C, _value_width(memory)))
    y, errors = factored_errors(memory, l2_regression, params, key, value)
    for t in range(C):
        want = mlp_read(p, key[t], residual)
        assert_close(y[t], want)
        dense = {n: np.outer(e.key[t], e.delta[t]) for n, e in errors.items()}
        assert_close(dense, mlp_gradient(p, key[t], want - value[t]))


def test_deep_memory_is_its_formula(x64, rng):
    p = float64(MEMORIES["deep"].init(jax.random.key(0)))
    x = rng.normal(size=(C, K))
    assert_close(MEMORIES["deep"].apply(p, x), gelu(gelu(x @ p["w0"]) @ p["w1"]) @ p["w2"])
    p = float64(MEMORIES["deep_residual"].init(jax.random.key(0)))
    assert_close(MEMORIES["deep_residual"].apply(p, x), x + gelu(x @ p["w0"]) @ p["w1"])


def test_leading_axes_are_independent_memories(x64, rng):
    memory = MEMORIES["mlp"]
    params = float64(jax.vmap(memory.init)(jax.random.split(jax.random.key(0), 2)))
    key, value = rng.normal(size=(2, 2, C, K))
    y, errors = factored_errors(memory, l2_regression, params, key, value)
    for h in range(2):
        own = jax.tree.map(lambda w, h=h: w[h], params)
        y_h, errors_h = factored_errors(memory, l2_regression, own, key[h], value[h])
        assert_close(y[h], y_h)
        assert_close(jax.tree.map(lambda e, h=h: e[h], errors), errors_h)


def test_a_value_made_by_the_memory_itself_is_a_constant_inside(x64, rng):
    """delta = (k - v) + W1 (gelu(W2 k) - gelu(W2 v)) (spec 2.3); the gradient is that with the value held fixed."""
    memory = MEMORIES["mlp"]
    params = float64(memory.init(jax.random.key(0)))
    p, (key, v) = numpy64(params), rng.normal(size=(2, C, K))
    _, errors = factored_errors(memory, l2_regression, params, key, memory.apply(params, v))
    want = (key - v) + (gelu(key @ p["w2"]) - gelu(v @ p["w2"])) @ p["w1"]
    assert_close(errors["w1"].delta, want)

    def through_value(v):  # ... and the outer gradient reaches the value
        _, errors = factored_errors(memory, l2_regression, params, key, memory.apply(params, v))
        return jnp.sum(errors["w1"].delta)

    assert float(jnp.abs(jax.grad(through_value)(v)).min()) > 0


def test_contract_and_gram_are_sums_over_tokens(x64, rng):
    key, delta = rng.normal(size=(2, C, K)), rng.normal(size=(2, C, F))
    error = Outer(delta, key)
    for h in range(2):
        assert_close(contract(error)[h], sum(np.outer(key[h, t], delta[h, t]) for t in range(C)))
        assert_close(gram(error)[h], sum(np.outer(key[h, t], key[h, t]) for t in range(C)))


@pytest.mark.parametrize("name", MEMORIES)
def test_start_weights_are_float32_and_differ_by_key(name):
    first, second = (MEMORIES[name].init(jax.random.key(i)) for i in (0, 1))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == jnp.float32 and a.shape == b.shape
        assert (a != b).all()


def test_a_linear_memory_starts_empty():
    assert not linear_memory(K, 2).init(jax.random.key(0))["w"].any()


def test_start_scales():
    """Standard deviations as documented, from 64 x 128 numbers: 5 standard errors are 4 %."""
    w = mlp_memory(64, 128, init_scale=0.5).init(jax.random.key(0))
    assert float(jnp.std(w["w1"])) == pytest.approx(0.5 / 128**0.5, rel=0.04)
    assert float(jnp.std(w["w2"])) == pytest.approx(64**-0.5, rel=0.04)


def test_deep_memory_refuses_bad_widths():
    with pytest.raises(ValueError, match=r"\(3,\)"):
        deep_memory((3,))
    with pytest.raises(ValueError, match="3 and 2"):
        deep_memory((3, 5, 2), residual=True)
