"""LSTM, the self-referential weight matrix and RWKV-7 against loops in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.recurrent import lstm, self_referential
from hope_jax.rwkv7 import rwkv7
from tests.oracles import assert_close, compiled, float64, numpy64, sigmoid, softmax

D, T = 6, 7


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


def rwkv7_loop(params, r, heads):
    """As printed, with the state [V, K] and row vectors."""
    width, last = D // heads, np.zeros(D)
    states, ys = [np.zeros((width, width)) for _ in range(heads)], []
    small = lambda p, x, between: between(x @ p["w1"]) @ p["w2"] + p["bias"]  # noqa: E731
    for t in range(T):
        x = {n: r[t] + (last - r[t]) * params["shift"][f"{n}_scale"] for n in ("r", "k", "v", "decay", "rate", "gate")}
        last = r[t]
        receptance, key, value = (x[n] @ params[f"w{n}"] for n in "rkv")
        rate = sigmoid(small(params["rate"], x["rate"], lambda z: z))
        decay = np.exp(-np.exp(-0.5) * sigmoid(small(params["decay"], x["decay"], np.tanh)))
        removal = key * params["removal"]["scale"]
        replacement = key * (1 + (rate - 1) * params["replacement"]["scale"])
        y = np.zeros(D)
        for h in range(heads):
            at = slice(h * width, (h + 1) * width)
            kappa = removal[at] / np.sqrt(np.sum(removal[at] ** 2) + 1e-12)
            transition = np.diag(decay[at]) - np.outer(kappa, rate[at] * kappa)
            states[h] = states[h] @ transition + np.outer(value[at], replacement[at])
            read = states[h] @ receptance[at]
            normed = (read - read.mean()) / np.sqrt(read.var() + 64e-5)
            bonus = receptance[at] @ (params["bonus"]["scale"][at] * replacement[at]) * value[at]
            y[at] = normed * params["norm"]["scale"][at] + params["norm"]["bias"][at] + bonus
        ys.append(y * small(params["gate"], x["gate"], sigmoid))
    return np.stack(ys), np.stack([s.T for s in states])


def test_rwkv7_neither_sees_nor_keeps_padding(x64, rng):
    """Whatever stands in a masked place; and a call without tokens leaves the state."""
    layer = rwkv7(D, heads=2, rank=3)
    params, r = float64(layer.init(jax.random.key(0))), rng.normal(size=(T, D))
    keep = np.arange(T) != 3
    run = compiled(lambda p, r: layer.apply(p, layer.init_state(p), r, mask_T=jnp.asarray(keep)))
    state, y = run(params, r)
    again, y_again = run(params, np.where(keep[:, None], r, 7.0))
    assert_close((again, y_again[keep]), (state, y[keep]), 0)
    assert_close(layer.apply(params, state, jnp.zeros((0, D)))[0], state, 0)


def test_rwkv7(x64, rng):
    """With random scales and biases, in two calls."""
    layer = rwkv7(D, heads=2, rank=3)
    params = jax.tree.map(lambda w: w + 0.3 * rng.normal(size=w.shape), numpy64(layer.init(jax.random.key(0))))
    r = rng.normal(size=(T, D))

    def run(params, r):
        state, head = layer.apply(params, layer.init_state(params), r[:3])
        state, tail = layer.apply(params, state, r[3:])
        return state.memory, (head, tail)

    memory, (head, tail) = compiled(run)(float64(params), r)
    want_y, want = rwkv7_loop(params, r, heads=2)
    assert_close(np.concatenate([head, tail]), want_y, 1e-11)  # the norm divides by the spread of three numbers
    assert_close(memory, want)


@pytest.mark.parametrize("name", ["lstm", "srwm"])
def test_the_published_recurrence(name, x64, rng):
    layer = lstm(D) if name == "lstm" else self_referential(D, heads=2)
    params, r = numpy64(layer.init(jax.random.key(0))), rng.normal(size=(T, D))
    state, y = compiled(lambda p, r: layer.apply(p, layer.init_state(p), r))(float64(params), r)
    want_y, want = lstm_loop(params, r) if name == "lstm" else self_referential_loop(params, r, heads=2)
    assert_close(y, want_y)
    assert_close(jax.tree.leaves(state), list(want) if name == "lstm" else [want])


@pytest.mark.parametrize("layer", [self_referential(D), lstm(D)], ids=["srwm", "lstm"])
def test_a_masked_token_leaves_the_state(layer, x64, rng):
    params, r = float64(layer.init(jax.random.key(0))), rng.normal(size=(T, D))
    keep = np.arange(T) != 3
    run = compiled(lambda p, r, m: layer.apply(p, layer.init_state(p), r, mask_T=m))
    state, y = run(params, r, keep)
    without, y_without = compiled(lambda p, r: layer.apply(p, layer.init_state(p), r))(params, r[keep])
    assert_close(state, without)
    assert_close(y[keep], y_without)
