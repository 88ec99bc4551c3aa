"""Surprise gates of self-modifying Titans: what they promise (spec 7.8); the token loop is among the switches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax import self_modifying
from hope_jax.surprise import fraction_written, gated
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
    assert fraction_written(gated_state.carry["surprise"]).tolist() == [1.0]


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
    assert fraction_written(later.carry["surprise"]).tolist() == [0.25]


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
    assert 0 < float(fraction_written(state.carry["surprise"])[0]) < 1


def test_padding_surprises_nobody(x64):
    config = change(chunk_proj=1, chunk_mem=1, surprise=1.0)
    params, r = shaken(config), stream(12)
    layer, mask = self_modifying(config), np.arange(12) % 3 != 1
    y = compiled(lambda p, r, m: layer.apply(p, layer.init_state(p), r, mask_T=m)[1])(float64(params), r, mask)
    assert_close(y, self_modifying_loop(config, params, r, mask))


def test_a_soft_gate_has_a_gradient(x64):
    """That of the outer loss is finite, before the first average too, and another than without the gate."""
    r = stream(6)

    def gradient(more):
        config = change(chunk_proj=2, chunk_mem=2, memory="linear", **more)
        layer = self_modifying(config)
        loss = lambda p: (layer.apply(p, layer.init_state(p), r, phase=0)[1] ** 2).sum()  # noqa: E731
        return jax.tree.leaves(compiled(jax.grad(loss))(float64(shaken(config))))

    soft, plain = gradient(GATES["soft"]), gradient({})
    assert all(np.isfinite(leaf).all() for leaf in soft)
    assert any(np.abs(a - b).max() > 1e-6 for a, b in zip(soft, plain, strict=True))


def test_retention_follows_the_gate():
    """alpha becomes 1 - g (1 - alpha)."""
    gates = {"eta": jnp.full((1, 3), 2.0), "log_alpha": jnp.log(jnp.full((1, 3), 0.9))}
    out = gated(gates, jnp.array([[0.0, 0.5, 1.0]]), retention=True)
    assert out["eta"].tolist() == [[0.0, 1.0, 2.0]]
    np.testing.assert_allclose(jnp.exp(out["log_alpha"]), [[1.0, 0.95, 0.9]], rtol=4 * np.finfo(np.float32).eps)
    assert gated(gates, jnp.zeros((1, 3)), retention=False)["log_alpha"] is gates["log_alpha"]
