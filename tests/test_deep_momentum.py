"""Deep momentum against a float64 NumPy loop with gradients by hand (spec 4.4), and what the spec promises of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax import Tokens, deep_momentum, l2_regression, level, linear_memory, nest
from tests.oracles import assert_close, compiled, descend, polar5

K, V, N = 5, 3, 6
LR, ALPHA, EPS = 0.1, 0.8, 1e-8


def _rms(x):
    return np.sqrt(np.mean(x**2))


def _inner(inner, o, z, n, lam):
    """The inner loss and its gradient with respect to o."""
    k, v = o.shape
    if inner == "l2":
        off = o - np.sqrt(max(k, v)) * polar5(n)
        return np.mean(off**2) / 2, off / (k * v)
    r = min(k, v)
    gram = o.T @ o / k if k >= v else o @ o.T / v
    off = gram - np.eye(r)
    slope = (o @ off / k if k >= v else off @ o / v) / r + lam * (o - z) / (k * v)
    return np.sum(off**2) / (4 * r) + lam / 2 * np.mean((o - z) ** 2), slope


def _loop(gradients, a0, inner, zeta, rho, lam, alpha=ALPHA):
    """One matrix: updates, inner losses before each write, (A, B), and whether the clip was ever at work."""
    a, b, n = a0, np.zeros(a0.shape[::-1]), np.zeros(gradients[0].shape)
    updates, losses, clipped = [], [], False
    for g in gradients:
        n = alpha * n + (1 - alpha) * g
        z = n / (_rms(n) + EPS)
        h = np.tanh(z @ a)
        loss, slope = _inner(inner, z + h @ b, z, n, lam)
        d_a, d_b = z.T @ ((slope @ b.T) * (1 - h**2)), h.T @ slope
        norm = np.sqrt(np.sum(d_a**2) + np.sum(d_b**2))
        clipped |= norm > 1
        a = a0 + rho * (a - a0) - zeta * d_a / max(norm, 1)
        b = rho * b - zeta * d_b / max(norm, 1)
        o = z + np.tanh(z @ a) @ b
        updates.append(-LR * o / max(1, _rms(o)))
        losses.append(loss)
    return updates, losses, (a, b), clipped


def _run(tx: Any, gradients):
    params = jax.tree.map(jnp.zeros_like, gradients[0])
    state, updates, update = compiled(tx.init)(params), [], compiled(tx.update)
    for g in gradients:
        u, state = update(g, state, params)
        updates.append(u)
    return updates, state


@pytest.mark.parametrize("inner", ["gram", "l2"])
@pytest.mark.parametrize("shape", [(K, V), (V, K)])
@pytest.mark.parametrize("hidden", [2, 32])
def test_is_the_loop(inner, shape, hidden, x64, rng):
    """A stack of two matrices of one layer, each with a network of its own; F = min(hidden, V)."""
    gradients = rng.normal(size=(N, 2, *shape))
    constants: Any = {"zeta": 0.3, "rho": 0.9, "lam": 0.2}
    tx = deep_momentum(LR, ALPHA, hidden=hidden, inner=inner, **constants)
    updates, state = _run(tx, gradients)
    memory = state.memory
    assert memory.a.shape == (2, shape[1], min(hidden, shape[1]))
    assert not np.allclose(memory.start[0], memory.start[1])
    for i in range(2):
        want, _, theta, _ = _loop(gradients[:, i], np.asarray(memory.start[i]), inner, **constants)
        assert_close([u[i] for u in updates], want)
        assert_close((memory.a[i], memory.b[i]), theta)


def test_the_gradient_of_the_network_is_clipped(x64, rng):
    """A gradient of rank one is far from orthogonal: its network's gradient is longer than one."""
    gradients = np.einsum("tk,tv->tkv", rng.normal(size=(N, 20)), np.ones((N, 20)) + 0.1 * rng.normal(size=(N, 20)))
    constants: Any = {"zeta": 0.3, "rho": 0.9, "lam": 0.2}
    updates, state = _run(deep_momentum(LR, ALPHA, **constants), gradients)
    want, _, _, clipped = _loop(gradients, np.asarray(state.memory.start), "gram", **constants)
    assert clipped
    assert_close(updates, want)


@pytest.mark.parametrize("inner, factor", [("gram", 3), ("l2", 1.5)])
def test_the_network_learns(inner, factor, x64, rng):
    """Ill-conditioned gradients that stay the same: the inner loss of what is read falls."""
    g = rng.normal(size=(8, 8)) * np.geomspace(1, 1e-2, 8)
    _, state = _run(deep_momentum(LR, 0.0, inner=inner), [g] * 200)
    z = g / (_rms(g) + EPS)
    loss, _ = _inner(inner, z + np.tanh(z @ state.memory.a) @ state.memory.b, z, g, 0.1)
    assert loss < _inner(inner, z, z, g, 0.1)[0] / factor


def test_without_learning_it_is_normalised_momentum():
    """Spec test 8, first step with zeta = 0, and all others."""
    gradients = np.random.default_rng(1).normal(size=(N, K, V)).astype(np.float32)
    updates, state = _run(deep_momentum(LR, ALPHA, zeta=0.0), gradients)
    n = np.zeros((K, V))
    for g, u in zip(gradients, updates, strict=True):
        n = ALPHA * n + (1 - ALPHA) * g
        assert_close(u, -LR * n / _rms(n), 1e-6)
    assert_close(state.memory.a, state.memory.start, 0)
    first, _ = _run(deep_momentum(LR, ALPHA, zeta=0.0), gradients[:1])
    assert_close(first[0], -LR * gradients[0] / _rms(gradients[0]), 1e-6)


@pytest.mark.parametrize("inner", ["gram", "l2"])
def test_an_update_is_never_longer_than_the_learning_rate(inner, rng):
    """Spec test 8: rms(update) <= lr (1 + 1e-5), for gradients of any size that change from step to step."""
    scales = np.array([1e-4, 1.0, 1e4])
    gradients = [
        {"m": jnp.asarray(scales[:, None, None] * rng.normal(size=(3, K, V)), jnp.float32), "v": 1e4 * jnp.ones(3)}
        for _ in range(20)
    ]
    updates, _ = _run(deep_momentum(LR, inner=inner, zeta=1.0), gradients)
    for u in updates:
        sizes = [*map(_rms, u["m"]), _rms(u["v"])]
        assert max(sizes) <= LR * (1 + 1e-5)
        assert min(sizes) > LR / 10


def test_leaves_without_a_network_are_normalised_momentum(x64, rng):
    """Vectors as a whole, scalars to their sign."""
    gradients = [{"v": rng.normal(size=4), "s": jnp.asarray(rng.normal())} for _ in range(N)]
    updates, state = _run(deep_momentum(LR, ALPHA), gradients)
    n = {"v": np.zeros(4), "s": np.zeros(())}
    for g, u in zip(gradients, updates, strict=True):
        n = {name: ALPHA * n[name] + (1 - ALPHA) * np.asarray(g[name]) for name in n}
        assert_close(u, {name: -LR * x / (_rms(x) + EPS) for name, x in n.items()})
    assert state.memory == {"v": None, "s": None}


@pytest.mark.parametrize("inner", ["gram", "l2"])
def test_zero_gradients_give_zero_updates_and_finite_outer_gradients(inner):
    tx: Any = deep_momentum(LR, inner=inner)
    zero = {"m": jnp.zeros((2, 3)), "v": jnp.zeros(3), "s": jnp.zeros(()), "e": jnp.zeros((0, 3)), "o": jnp.zeros(0)}

    def moved(g):
        u, state = tx.update(g, tx.init(g))
        w, state = tx.update(g, state)
        return sum(jnp.sum(x) for x in jax.tree.leaves((u, w))), (u, w, state.memory)

    slope, (*updates, memory) = compiled(jax.grad(moved, has_aux=True))(zero)
    assert_close(updates, [zero, zero], 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((slope, memory)))
    assert np.any(slope["m"] != 0)


@pytest.mark.parametrize("inner", ["gram", "l2"])
def test_as_the_rule_of_a_level(inner, x64, rng):
    """Gates eta and mu of every token in the place of the constants."""
    length = 5
    n = nest(level(linear_memory(K, V), deep_momentum(inner=inner, hidden=2), 2, objective=l2_regression, read="after"))
    key, query = rng.normal(size=(2, length, K))
    value, start = rng.normal(size=(length, V)), rng.normal(size=(K, V))
    eta, mu = rng.uniform(0.1, 0.5, length), jnp.full(length, 0.7)
    state, y = compiled(lambda w, xs: n.apply(n.init(({"w": w},)), xs))(start, Tokens(key, value, query, eta, mu=mu))
    a0 = np.asarray(state.levels[0].rule.memory["w"].start)
    w, gradients = start, []
    for t in range(length):
        at = w if t % 2 == 0 else at  # noqa: F821  (t = 0 comes first)
        gradients.append(np.outer(key[t], key[t] @ at - value[t]))
        updates, *_ = _loop(gradients, a0, inner, 0.1, 0.999, 0.1, 0.7)
        w = w + eta[t] / LR * updates[-1]
        assert_close(y[t], query[t] @ w)
    assert_close(state.levels[0].running["w"], w)


def test_trains_under_jit_and_scan():
    """With a falling learning rate, since its steps do not shrink with the gradients; dtypes stay."""
    tx: Any = deep_momentum(optax.linear_schedule(0.1, 0.0, 300))
    rng = np.random.default_rng(0)
    target: Any = {"m": jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32), "v": jnp.asarray(rng.normal(size=5))}
    target |= {"half": target["m"].astype(jnp.bfloat16), "none": None, "masked": optax.MaskedNode()}
    end = descend(tx, target, 300)
    for got, want in zip(jax.tree.leaves(end), jax.tree.leaves(target), strict=True):
        np.testing.assert_allclose(np.float32(got), np.float32(want), atol=0.1 if got.dtype == jnp.bfloat16 else 2e-2)


def test_hyperparameters_can_be_injected():
    numbers: Any = {"learning_rate": 0.1, "alpha": 0.5, "zeta": 0.2, "rho": 0.9, "lam": 0.3}
    g = {"w": jnp.ones((2, 3)).at[0].set(2.0)}
    plain = deep_momentum(**numbers)
    injected = optax.inject_hyperparams(deep_momentum, static_args=("hidden", "seed"))(**numbers)
    (a,), (b,) = (_run(tx, [g])[0] for tx in (plain, injected))
    assert_close(b, a, 1e-7)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"inner": "cosine"}, '"gram" or "l2"; got \'cosine\''),
        ({"hidden": 0}, "hidden.*0"),
        ({"zeta": -0.1}, "zeta.*-0.1"),
        ({"rho": 1.5}, r"rho lies in \[0, 1\]; got 1.5"),
        ({"lam": -1}, "lam.*-1"),
        ({"alpha": 1.0}, r"\[0, 1\); got 1.0"),
        ({"learning_rate": -1.0}, "learning_rate.*-1.0"),
    ],
)
def test_bad_constants_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        deep_momentum(**{"learning_rate": 0.1, **options})


def test_says_that_it_needs_a_step_size():
    with pytest.raises(ValueError, match=r"deep_momentum\(learning_rate=...\) or .* eta="):
        _run(deep_momentum(), [jnp.ones((2, 2))])
