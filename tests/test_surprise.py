"""Surprise gates of self-modifying Titans: what they promise (spec 7.8); the token loop is among the switches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax import self_modifying
from hope_jax.surprise import gate_by_surprise, gated, init_surprise
from tests.oracles import assert_close, compiled, float64, self_modifying_loop
from tests.test_self_modifying import change, shaken, stream, whole_call

GATES = {
    "hard": {"surprise": 1.0},
    "soft": {"surprise": 0.9, "surprise_temperature": 0.3, "gate_retention": True},
}


def test_a_gate_of_one_is_no_gate(x64):
    """Spec test 43, to the bit: every error is at least nothing, and alpha is not computed another way."""
    r = stream(12)
    plain, gate = (change(chunk_proj=2, chunk_mem=4, surprise=s, gate_retention=True) for s in (None, 0.0))
    params = shaken(plain)
    state, y = whole_call(plain, params, r)
    gated_state, gated_y = whole_call(gate, params, r)
    np.testing.assert_array_equal(gated_y, y)
    jax.tree.map(np.testing.assert_array_equal, gated_state.levels, state.levels)
    assert gated_state.carry["surprise"].written_H.tolist() == [1.0]


@pytest.mark.parametrize("retention", [True, False])
def test_a_shut_gate_freezes_the_state(retention, x64):
    """Spec test 43: without momentum nothing moves, to the bit; without `gate_retention` memories still fade."""
    config = change(chunk_proj=4, chunk_mem=4, surprise=1e9, gate_retention=retention, momentum=None)
    layer, params, r = self_modifying(config), float64(shaken(config)), stream(16)
    apply = compiled(layer.apply, static_argnames="phase")
    state, _ = apply(params, layer.init_state(params), r[:4], phase=0)  # before an average everything is written
    later, _ = apply(params, state, r[4:], phase=4)
    weights, faded = (jax.tree.leaves([level.start for level in one.levels]) for one in (state, later))
    same = [bool((a == b).all()) for a, b in zip(weights, faded, strict=True)]
    assert all(same) if retention else not any(same)
    assert later.carry["surprise"].written_H.tolist() == [0.25]


@pytest.mark.parametrize("name", GATES)
def test_a_stream_may_be_cut_anywhere(name, x64):
    """The average of a chunk is whole however its tokens came."""
    config = change(chunk_proj=2, chunk_mem=4, **GATES[name])
    layer, params, r = self_modifying(config), shaken(config), stream(14)
    want = self_modifying_loop(config, params, r)
    state, _ = whole_call(config, params, r)
    params, token = float64(params), compiled(layer.apply)
    decoded = layer.init_state(params)
    for t in range(len(r)):
        decoded, y = token(params, decoded, r[t : t + 1])
        assert_close(y[0], want[t])
    assert_close(decoded, state)
    assert 0 < float(state.carry["surprise"].written_H[0]) < 1


def test_padding_surprises_nobody(x64):
    config = change(chunk_proj=1, chunk_mem=1, surprise=1.0)
    params, r = shaken(config), stream(12)
    layer, mask = self_modifying(config), np.arange(12) % 3 != 1
    run = compiled(lambda p, r, m: layer.apply(p, layer.init_state(p), r, mask_T=m))
    _, y = run(float64(params), r, mask)
    assert_close(y, self_modifying_loop(config, params, r, mask))
    everything = self_modifying(change(chunk_proj=1, chunk_mem=1, surprise=0.0))
    state, _ = compiled(lambda p, r, m: everything.apply(p, everything.init_state(p), r, mask_T=m))(
        float64(params), r, mask
    )
    assert float(state.carry["surprise"].written_H[0]) == pytest.approx(1, abs=12 * float(np.finfo(np.float32).eps))


def test_a_soft_gate_has_a_gradient(x64):
    """That of the sigmoid for the error of its own token; what is usual is a constant."""
    rng = np.random.default_rng(0)
    errors, weights = rng.normal(size=(2, 1, 4, 3)), rng.normal(size=(1, 4))
    state, _ = gate_by_surprise(init_surprise(1), jnp.asarray(errors[0]), None, 4, 0.9, 0.3)

    def loss(before, now):
        state, _ = gate_by_surprise(init_surprise(1), before, None, 4, 0.9, 0.3)
        return (gate_by_surprise(state, now, None, 4, 0.9, 0.3)[1] * weights).sum()

    before, now = jax.grad(loss, argnums=(0, 1))(*map(jnp.asarray, errors))
    norm = np.linalg.norm(errors[1], axis=-1)
    gate = 1 / (1 + np.exp(-(norm / float(state.average_H[0]) - 0.9) / 0.3))
    slope = weights * gate * (1 - gate) / 0.3 / float(state.average_H[0])
    np.testing.assert_allclose(now, (slope / norm)[..., None] * errors[1], rtol=1e-11)
    assert not before.any()


@pytest.mark.parametrize("log_alpha", [-1e-3, -1.0, -30.0])
def test_gradients_of_gated_retention_are_finite(log_alpha):
    """Also where the gate is whole or shut and nearly everything is forgotten."""

    def retained(log_alpha, gate):
        return gated({"eta": gate, "log_alpha": log_alpha}, gate, retention=True)["log_alpha"].sum()

    gates = jnp.array([[0.0, 0.5, 1.0]])
    grads = jax.grad(retained, argnums=(0, 1))(jnp.full((1, 3), log_alpha), gates)
    assert all(np.isfinite(g).all() for g in grads)
    assert grads[0][0, 2] == 1 and grads[0][0, 0] == 0


def test_retention_follows_the_gate():
    """alpha becomes 1 - g (1 - alpha)."""
    gates = {"eta": jnp.full((1, 3), 2.0), "log_alpha": jnp.log(jnp.full((1, 3), 0.9))}
    out = gated(gates, jnp.array([[0.0, 0.5, 1.0]]), retention=True)
    assert out["eta"].tolist() == [[0.0, 1.0, 2.0]]
    np.testing.assert_allclose(jnp.exp(out["log_alpha"]), [[1.0, 0.95, 0.9]], rtol=4 * np.finfo(np.float32).eps)
    assert gated(gates, jnp.zeros((1, 3)), retention=False)["log_alpha"] is gates["log_alpha"]
