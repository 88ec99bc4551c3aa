"""The window of `omega` and `atlas`: across calls, heads, masks, and in every gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax import Tokens, atlas, linear_memory, newton_schulz, omega
from tests.oracles import assert_close, compiled

K, V, T, H, C, WINDOW = 3, 2, 7, 2, 3, 4
KEEP = np.arange(T) != 2  # a token inside the windows of later chunks
NESTS = {
    "omega": omega(linear_memory(K, V, 1.0), (K, V), C, WINDOW),
    "atlas": atlas(linear_memory(K, V, 1.0), (K, V), C, WINDOW),
}


def tokens(rng, heads=(H,)) -> Any:
    key, query = rng.normal(size=(2, T, *heads, K))
    gates = rng.uniform(0.2, 0.9, (3, T, *heads))
    return Tokens(key, rng.normal(size=(T, *heads, V)), query, *gates, mask=KEEP)


def loop(name, start, xs):
    """One head, one token at a time, with `jax.grad` for errors."""

    def fit(w, i):
        return jnp.sum((xs.key[i] @ w - xs.value[i]) ** 2) / 2

    def window(w, t, weight):
        return sum(weight[i] * jax.grad(fit)(w, i) for i in range(max(t - WINDOW + 1, 0), t + 1) if KEEP[i])

    def atlas_write(w, s, ts):
        s = jnp.prod(xs.mu[ts]) * s + sum(window(w, t, jnp.ones(T)) for t in ts)
        return jnp.prod(xs.alpha[ts]) * w - jnp.sum(xs.eta[ts]) * newton_schulz(s), s

    w, s, ys = start, jnp.zeros_like(start), []
    for first in range(0, T, C):
        chunk = range(first, min(first + C, T))
        ys += [xs.query[t] @ w for t in chunk]
        kept = np.array([t for t in chunk if KEEP[t]])
        if name == "atlas":
            w, s = atlas_write(w, s, kept) if len(chunk) == C else (w, s)
            continue
        w0 = w
        for t in kept:
            w = xs.alpha[t] * w - window(w0, t, xs.eta)
    return jnp.stack(ys), w


@pytest.mark.parametrize("name", NESTS)
def test_gradients_are_those_of_the_token_loop(name, x64, rng):
    """Reads, last weights and the gradient to all that goes in, with a masked token."""
    xs, start = tokens(rng, ()), rng.normal(size=(K, V))
    at_y, at_w = rng.normal(size=(T, V)), rng.normal(size=(K, V))
    mask = jnp.asarray(KEEP)

    def fast(start, xs):
        state, y = NESTS[name].apply(NESTS[name].init(({"w": start},)), xs._replace(mask=mask))
        last = state.levels[0]
        return y, (last.start if last.running is None else last.running)["w"]

    def outcome(model):
        def loss(start, xs):
            y, w = model(start, xs)
            return jnp.sum(y * at_y) + jnp.sum(w * at_w), (y, w)

        return compiled(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(start, xs._replace(mask=None))

    assert_close(outcome(fast), outcome(lambda start, xs: loop(name, start, xs)), 1e-11)


@pytest.mark.parametrize("name", NESTS)
def test_one_call_is_any_split_and_heads_are_alone(name, x64, rng):
    """A call cut inside a chunk, where the window goes on, with the phase unknown; heads that share their gates."""
    n, xs = NESTS[name], tokens(rng)
    xs = xs._replace(eta=xs.eta[:, 0], alpha=xs.alpha[:, 0])
    start = rng.normal(size=(H, K, V))
    part = lambda a, b: jax.tree.map(lambda x: x[a:b], xs)  # noqa: E731
    fresh = compiled(lambda w, xs: n.apply(n.init(({"w": w},)), xs))
    state, y = fresh(start, xs)
    half, head = fresh(start, part(0, 4))
    end, tail = compiled(n.apply)(half, part(4, T))
    assert_close((end, jnp.concatenate([head, tail])), (state, y))
    own = Tokens(xs.key[:, 1], xs.value[:, 1], xs.query[:, 1], xs.eta, xs.alpha, xs.mu[:, 1], mask=KEEP)
    assert_close(y[:, 1], fresh(start[1], own)[1])


def test_an_error_of_zero_has_finite_gradients(x64):
    """Muon's normalisation at exactly zero."""
    n, x, g = atlas(linear_memory(K, V), (K, V), 2, WINDOW), jnp.ones((4, K)), jnp.full(4, 0.5)

    def loss(start, value):
        _, y = n.apply(n.init(({"w": start},)), Tokens(x, value, x, g, g, g))
        return jnp.sum(jnp.sin(y + 1))

    grads = compiled(jax.grad(loss, argnums=(0, 1)))(jnp.zeros((K, V)), jnp.zeros((4, V)))
    assert all(np.isfinite(g).all() for g in grads)
    assert np.abs(grads[1]).max() > 0


@pytest.mark.parametrize("make", [omega, atlas])
def test_bad_input_is_named(make):
    memory, x = linear_memory(K, V), jnp.ones((4, K))
    with pytest.raises(ValueError, match="window is a number of tokens, at least 1; got 0"):
        make(memory, (K, V), C, 0)
    n = make(memory, (K, V), C, 2)
    missing = "eta" if make is omega else "eta, mu"
    with pytest.raises(ValueError, match=rf"needs the gates {missing}; the Tokens have \['alpha'\]"):
        n.apply(n.init(n.params(jax.random.key(0))), Tokens(x, x[:, :V], x, alpha=x[:, 0]))
