"""Projections and gates of a memory layer."""

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax import delta_net, gated_linear_attention
from hope_jax.gates import discretised, fixed_decay, read_outs, retained, step_size
from hope_jax.memory_layer import Projections, memory_layer
from tests.oracles import assert_close, compiled, float64, l2_unit, numpy64, projected, sigmoid, silu

D, H, K, T = 6, 2, 3, 5


def test_a_delta_net_layer_is_its_loop(x64, rng):
    """Projection, convolution over four tokens, activation, unit keys, the gate, and a matrix per head."""
    layer = memory_layer(delta_net(K, K), Projections(D, H, K, K, read_outs(eta=step_size(0.5, most=2.0))))
    params = numpy64(layer.init(jax.random.key(0)))
    params["conv"] = {n: rng.normal(size=w.shape) for n, w in params["conv"].items()}
    r = rng.normal(size=(T, D))
    q, k, v = projected(params, r)
    q, k = l2_unit(q), l2_unit(k)
    gate = params["gates"]["eta"]
    eta = 2.0 * sigmoid(r @ gate["w"] + gate["b"])
    state, want = np.zeros((H, K, K)), []
    for t in range(T):
        for h in range(H):
            state[h] -= eta[t, h] * np.outer(k[t, h], k[t, h] @ state[h] - v[t, h])
        want.append(np.concatenate([q[t, h] @ state[h] for h in range(H)]))

    def run(params, r):
        after, head = layer.apply(params, layer.init_state(params), r[:2], phase=0)
        after, tail = layer.apply(params, after, r[2:])
        return after.nest.levels[0].running["w"], jnp.concatenate([head, tail])

    end, y = compiled(run)(float64(params), r)
    assert_close(y, np.stack(want))
    assert_close(end, state)


def test_shared_keys_and_the_skip(x64, rng):
    """One key head for all memories is the same keys given to each; the skip adds the value."""
    gates = read_outs(eta=step_size(0.5), log_alpha=retained(0.9))
    memory = gated_linear_attention(K, K)
    shared = memory_layer(memory, Projections(D, H, K, K, gates, key_heads=1), skip=True)
    repeated = memory_layer(memory, Projections(D, H, K, K, gates))
    params, r = numpy64(shared.init(jax.random.key(0))), rng.normal(size=(T, D))
    again = dict(params, wq=np.tile(params["wq"], (1, H)), wk=np.tile(params["wk"], (1, H)))
    again["conv"] = {n: np.tile(w, (1, H // w.shape[1], 1)) for n, w in params["conv"].items()}
    del again["skip"]
    _, y = compiled(lambda p, r: shared.apply(p, shared.init_state(p), r))(float64(params), r)
    _, without = compiled(lambda p, r: repeated.apply(p, repeated.init_state(p), r))(float64(again), r)
    assert_close(y, np.asarray(without) + silu(r @ params["wv"]))  # the convolution starts as the identity


def test_gates_start_where_they_are_told(rng):
    """Averages over random inputs; alpha never exceeds one and eta is never negative (spec 10, test 40)."""
    made = read_outs(eta=step_size(0.02), log_alpha=retained(0.99), beta=step_size(1.0, most=2.0))
    r = jnp.asarray(rng.normal(size=(400, 64)), jnp.float32)
    gates = made.apply(made.init(jax.random.key(0), 64, 4), r)
    assert 0.985 < float(jnp.exp(gates["log_alpha"]).mean()) < 0.995 and float(gates["log_alpha"].max()) <= 0
    assert 0.02 / 1.5 < float(gates["eta"].mean()) < 0.02 * 1.5 and float(gates["eta"].min()) >= 0
    assert 0.9 < float(gates["beta"].mean()) < 1.1 and float(gates["beta"].max()) <= 2


def test_retnet_and_mamba2_decay_as_published(rng):
    r = jnp.asarray(rng.normal(size=(T, D)), jnp.float32)
    fixed = fixed_decay(3).apply({}, r)
    np.testing.assert_allclose(np.exp(fixed["log_alpha"][0]), [1 - 2.0**-5, 1 - 2.0**-6, 1 - 2.0**-7], rtol=1e-6)
    made = discretised()
    params = made.init(jax.random.key(0), D, H)
    assert ((params["rate"]["b"] >= 0) & (params["rate"]["b"] <= np.log(16))).all()
    steps = made.apply(params, jnp.zeros((1, D)))
    assert ((steps["eta"] > 0.99e-3) & (steps["eta"] < 0.101)).all()
    gates = made.apply(params, r)
    np.testing.assert_allclose(gates["log_alpha"], -np.exp(params["rate"]["b"])[None] * gates["eta"], rtol=1e-6)
