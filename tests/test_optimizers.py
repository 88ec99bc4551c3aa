"""`every`: a clock of several optimizer steps (spec 4.9)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax import every, retention
from tests.oracles import assert_close, compiled, primitives

K = 4  # a power of two: dividing by it is exact
W: Any = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5]])}


def _gradients(n, seed=0):
    rng = np.random.default_rng(seed)
    return [{"a": jnp.asarray(rng.normal(size=2), jnp.float32), "b": jnp.ones((1, 1)) * i} for i in range(n)]


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_zeros_between_and_the_rule_on_the_reduced_gradients_at_multiples(reduce):
    """Bit for bit, with a rule that has a state and looks at the weights."""
    inner: Any = optax.adamw(0.1)
    tx: Any = every(K, inner, reduce)
    step, inner_step = compiled(tx.update), compiled(inner.update)
    state, inner_state, w = tx.init(W), inner.init(W), W
    gradients = _gradients(2 * K + 1)
    for i, g in enumerate(gradients):
        updates, state = step(g, state, w)
        if (i + 1) % K:
            assert_close(updates, jax.tree.map(jnp.zeros_like, W), 0)
        else:
            total = jax.tree.map(lambda a, b, c, d: ((a + b) + c) + d, *gradients[i - K + 1 : i + 1])
            if reduce == "mean":
                total = jax.tree.map(lambda x: x / K, total)
            want, inner_state = inner_step(total, inner_state, w)
            assert_close(updates, want, 0)
            assert_close(state.inner, inner_state, 0)
            assert all(np.any(u != 0) for u in jax.tree.leaves(updates))
        w = optax.apply_updates(w, updates)
    assert int(state.count) == 1
    assert_close(state.pending, gradients[-1], 0)


def test_every_step_is_the_rule_itself():
    inner: Any = optax.adam(0.1)
    tx: Any = every(1, inner)
    state, want = tx.init(W), inner.init(W)
    assert_close(state, want, 0)
    for g in _gradients(2):
        a, state = tx.update(g, state, W)
        b, want = inner.update(g, want, W)
        assert_close((a, state), (b, want), 0)


def test_the_rule_is_not_computed_while_waiting():
    """Its square root is in one branch of one conditional and nowhere else."""
    tx: Any = every(K, optax.adam(0.1))
    jaxpr = jax.make_jaxpr(tx.update)(W, tx.init(W), W).jaxpr
    (cond,) = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    wait, step = (primitives(b.jaxpr) for b in cond.params["branches"])
    outside = {e.primitive.name for e in jaxpr.eqns}
    assert "sqrt" in step
    assert "sqrt" not in wait | outside


def test_levels_of_different_clocks_side_by_side():
    """Spec test 30: each leaf moves exactly at its own multiples."""
    tx: Any = optax.partition({"fast": optax.sgd(1.0), "slow": every(4, optax.sgd(1.0))}, {"a": "fast", "b": "slow"})
    state = tx.init(W)
    for i, g in enumerate(_gradients(8)):
        updates, state = tx.update(g, state, W)
        assert np.any(updates["a"] != 0)
        assert bool(np.any(updates["b"] != 0)) == ((i + 1) % 4 == 0)


def test_extra_arguments_reach_the_rule():
    def update(updates: Any, state: Any, params: Any = None, *, gain: float, **_: Any):
        return jax.tree.map(lambda x: gain * x, updates), state

    rule: Any = update
    scaled = optax.GradientTransformationExtraArgs(optax.identity().init, rule)
    tx: Any = every(2, scaled)
    state = tx.init(W)
    _, state = tx.update(W, state, W, gain=3.0)
    updates, _ = tx.update(W, state, W, gain=3.0)
    assert_close(updates, jax.tree.map(lambda x: 6.0 * x, W), 0)


def test_keeps_the_dtype_of_the_gradients():
    """Low-precision gradients come out as they went in, from both branches."""
    g = jnp.ones(2, jnp.bfloat16)
    tx: Any = every(2, optax.adam(0.1))
    updates, state = tx.update(g, tx.init(g), g)
    assert updates.dtype == jnp.bfloat16
    assert tx.update(g, state, g)[0].dtype == jnp.bfloat16


def test_float32_gates_keep_low_precision_states():
    """The branches of the conditional agree, and pending sums keep the dtype of the weights."""
    w = jnp.ones(2, jnp.bfloat16)
    tx: Any = every(2, optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(0.1), retention()))
    state = tx.init(w)
    for _ in range(2):
        updates, new = tx.update(jnp.ones(2, jnp.float32), state, w, alpha=jnp.float32(0.5))
        assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)
        assert updates.dtype == jnp.float32
        state = new


def test_runs_under_scan_and_vmap():
    """One program for a run of steps, and independent clocks side by side."""
    tx: Any = every(2, optax.sgd(1.0))
    gs = jnp.arange(12.0).reshape(2, 6)

    def run(gs):
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(jnp.zeros(())), gs)[1]

    want = np.zeros((2, 6))
    want[:, 1::2] = -(np.asarray(gs)[:, ::2] + np.asarray(gs)[:, 1::2])
    assert_close(jax.vmap(run)(gs), want, 0)


def test_refuses_bad_arguments():
    with pytest.raises(ValueError, match="0"):
        every(0, optax.sgd(1.0))
    with pytest.raises(ValueError, match="'max'"):
        every(2, optax.sgd(1.0), reduce="max")
