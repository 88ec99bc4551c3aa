"""LSTM and the self-referential weight matrix against loops in NumPy float64."""

import jax
import numpy as np
import pytest

from hope_jax.recurrent import lstm, self_referential
from tests.oracles import assert_close, compiled, float64, numpy64, sigmoid

D, T = 6, 7


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def lstm_loop(params, r):
    hidden, cell, ys = np.zeros(D), np.zeros(D), []
    for t in range(T):
        i, f, o, g = np.split(r[t] @ params["wx"] + hidden @ params["wh"] + params["gates"]["b"], 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
        ys.append(hidden)
    return np.stack(ys), (hidden, cell)


def self_referential_loop(params, r, heads):
    """As printed, with column vectors: W is [3 K + 4, K]."""
    width = D // heads
    columns = [w.T for w in params["start"]["w"]]
    ys = []
    for t in range(T):
        x = (r[t] @ params["in_proj"]).reshape(heads, width)
        y = []
        for h, w in enumerate(columns):
            made = w @ softmax(x[h])
            q, k, rate = made[width : 2 * width], made[2 * width : 3 * width], sigmoid(made[3 * width :])
            rates = np.concatenate(
                [np.full(width, rate[0]), np.full(width, rate[1]), np.full(width, rate[2]), np.full(4, rate[3])]
            )
            columns[h] = w + np.outer(rates * (w @ softmax(q) - w @ softmax(k)), softmax(k))
            y.append(made[:width])
        ys.append(np.concatenate(y))
    return np.stack(ys), np.stack([w.T for w in columns])


@pytest.mark.parametrize("name", ["lstm", "srwm"])
def test_the_published_recurrence(name, x64, rng):
    layer = lstm(D) if name == "lstm" else self_referential(D, heads=2)
    params, r = numpy64(layer.init(jax.random.key(0))), rng.normal(size=(T, D))
    state, y = compiled(lambda p, r: layer.apply(p, layer.init_state(p), r))(float64(params), r)
    want_y, want = lstm_loop(params, r) if name == "lstm" else self_referential_loop(params, r, heads=2)
    assert_close(y, want_y)
    assert_close(jax.tree.leaves(state), list(want) if name == "lstm" else [want])


def test_a_masked_token_leaves_the_state(x64, rng):
    layer = self_referential(D)
    params, r = float64(layer.init(jax.random.key(0))), rng.normal(size=(T, D))
    keep = np.arange(T) != 3
    run = compiled(lambda p, r, m: layer.apply(p, layer.init_state(p), r, mask_T=m))
    state, y = run(params, r, keep)
    without, y_without = compiled(lambda p, r: layer.apply(p, layer.init_state(p), r))(params, r[keep])
    assert_close(state, without)
    assert_close(y[keep], y_without)
