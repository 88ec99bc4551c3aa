"""Generalised gradient descent against minimisers and float64 loops over tokens (spec 3.6)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax import (
    Outer,
    Tokens,
    delta_momentum,
    dgd,
    dot_product,
    generalised_momentum,
    ggd,
    huber,
    huber_norm,
    l2_regression,
    level,
    linear_memory,
    lp_regression,
    nest,
    preconditioned_momentum,
    retention,
)
from tests.oracles import assert_close, compiled, proximal

K, V, N = 4, 3, 6
HUBER, SQUARE = huber(0.5), lp_regression(2.0)


def _after(tx: Any, error: Any, start, **extra) -> Any:
    """Weights after one update from a fresh state."""
    after = lambda e, w, x: optax.apply_updates(w, tx.update(e, tx.init(w), w, **x)[0])  # noqa: E731
    return compiled(after)(error, start, extra)


@pytest.fixture
def pairs(x64, rng):
    """Start weights, and the keys and errors of N tokens."""
    return rng.normal(size=(K, V)), rng.normal(size=(N, K)), rng.normal(size=(N, V))


def _loop(start, key, delta, eta, alpha, token, window=1):
    """W after every token: token(W, W', eta, key, delta) from the last `window` weights, by the collapsed pull."""
    weights, w = [], start
    for t in range(len(key)):
        weights.append(w)
        held = weights[-window:]
        rates = 1 / eta[max(t - window + 1, 0) : t + 1]
        e = 1 / rates.sum()
        middle = e * sum(r * x for r, x in zip(rates, held, strict=True))
        w = token(w, middle, e, key[t], delta[t]) + (alpha[t] - 1) * w
    return w


def _by_steps(slope, steps):
    """Gradient steps on l(k W, -delta) + 1 / (2 eta) ||W - W'||^2 of size eta / (1 + eta ||k||^2)."""

    def token(w, middle, eta, k, delta):
        new = middle
        for _ in range(steps):
            new = new - proximal(eta, k) * (np.outer(k, slope(k @ new + delta)) + (new - middle) / eta)
        return new

    return token


# --- closed forms ----------------------------------------------------------------------------------------------------


def test_the_dot_product_is_gradient_descent_and_the_regression_dgd(pairs, rng):
    start, key, delta = pairs
    gates = {"eta": rng.uniform(0.1, 0.9, N), "alpha": rng.uniform(0.6, 1, N)}
    error = Outer(delta, key)
    same = ((dot_product, dgd(exact=False, decay=False)), (l2_regression, dgd()))
    for objective, rule in same:
        assert_close(_after(ggd(objective), error, start, **gates), _after(rule, error, start, **gates), 0)
    w = start
    for t in range(N):
        w = gates["alpha"][t] * w - gates["eta"][t] * np.outer(key[t], delta[t])
    assert_close(_after(ggd(dot_product), error, start, **gates), w)


def test_a_window_is_the_minimiser_of_all_its_pulls(pairs, rng):
    """Three weights that hold, each with its own rate: the regression as one least-squares problem per token."""
    start, key, delta = pairs
    eta, c = rng.uniform(0.2, 0.9, N), 3
    weights = [start]
    for t in range(N):
        held, rates = weights[-c:], 1 / eta[max(t - c + 1, 0) : t + 1]
        rows = np.concatenate([key[t][None], *(np.sqrt(r) * np.eye(K) for r in rates)])
        targets = np.concatenate([-delta[t][None], *(np.sqrt(r) * w for r, w in zip(rates, held, strict=True))])
        weights.append(np.linalg.lstsq(rows, targets)[0])
    assert_close(_after(ggd(l2_regression, c), Outer(delta, key), start, eta=eta), weights[-1], 1e-11)


@pytest.mark.parametrize("window", [2, 9])
def test_windows_with_retention(window, pairs, rng):
    """The dot product from W', per-token gates, and a stream in pieces of 1 + 3 + 2 tokens."""
    start, key, delta = pairs
    eta, alpha = rng.uniform(0.2, 0.9, N), rng.uniform(0.6, 1, N)
    tx: Any = ggd(dot_product, window)
    state, w = tx.init(start), jnp.asarray(start)
    for piece in (slice(0, 1), slice(1, 4), slice(4, 6)):
        step, state = tx.update(Outer(delta[piece], key[piece]), state, w, eta=eta[piece], alpha=alpha[piece])
        w = w + step
    token = lambda w, middle, eta, k, delta: middle - eta * np.outer(k, delta)  # noqa: E731
    assert_close(w, _loop(start, key, delta, eta, alpha, token, window))


def test_a_step_of_zero_holds_everything(pairs):
    start, key, delta = pairs
    for rule in (ggd(HUBER, 3), ggd(l2_regression, 3), ggd(HUBER)):
        assert_close(_after(rule, Outer(delta, key), start, eta=np.zeros(N)), start)


# --- other objectives, retentions and values -------------------------------------------------------------------------


@pytest.mark.parametrize("steps, window", [(1, 1), (3, 1), (2, 3)])
def test_other_objectives_take_gradient_steps(steps, window, pairs, rng):
    start, key, delta = pairs
    eta, alpha = rng.uniform(0.2, 0.9, N), rng.uniform(0.6, 1, N)
    slope = lambda r: np.clip(r, -0.5, 0.5)  # noqa: E731
    tx = ggd(HUBER, window, steps=steps)
    want = _loop(start, key, delta, eta, alpha, _by_steps(slope, steps), window)
    assert_close(_after(tx, Outer(delta, key), start, eta=eta, alpha=alpha), want)


@pytest.mark.parametrize("objective", [HUBER, pytest.param(huber_norm(0.5), marks=pytest.mark.slow), SQUARE])
@pytest.mark.parametrize("eta", [0.3, 30.0])
def test_many_steps_minimise_the_sum(objective, eta, pairs):
    """Stationarity, however large eta is: the step fits every objective of curvature up to one."""
    start, key, delta = pairs
    tx = ggd(objective, learning_rate=eta, steps=600)
    w = _after(tx, Outer(delta[:1], key[:1]), start)

    def total(w):
        return objective.loss(key[0] @ w, -delta[0]) + jnp.sum((w - start) ** 2) / (2 * eta)

    assert_close(jax.grad(total)(w), jnp.zeros((K, V)), 1e-8)
    if objective is SQUARE:
        assert_close(w, _after(ggd(learning_rate=eta), Outer(delta[:1], key[:1]), start), 1e-8)


def test_one_step_is_gradient_descent_on_the_objective(pairs, rng):
    """With the errors of the pairs at the current weights: on a level, Huber memory by `ggd` is `huber` by `dgd`."""
    start, key, value = pairs
    ours = nest(level(linear_memory(K, V), ggd(HUBER), 1, objective=dot_product))
    theirs = nest(level(linear_memory(K, V), dgd(decay=False), 1, objective=HUBER))
    xs = Tokens(key, value, eta=rng.uniform(0.2, 0.9, N))
    got, want = (compiled(n.apply)(n.init(({"w": jnp.asarray(start)},)), xs)[0].levels[0].start for n in (ours, theirs))
    assert_close(got, want)


def test_retention_can_be_any_function(pairs):
    """The squared distance is the window of one; a quartic one is stationary after many steps."""
    start, key, delta = pairs
    error = Outer(delta[:1], key[:1])
    half = lambda w, held: jnp.sum((w - held) ** 2, axis=(-2, -1)) / 2  # noqa: E731
    for objective in (HUBER, l2_regression, dot_product):
        same = ggd(objective, half, learning_rate=0.4, steps=3), ggd(objective, learning_rate=0.4, steps=3)
        assert_close(*(_after(tx, error, start) for tx in same))
    soft = lambda w, held: jnp.sum(jnp.sqrt(1 + (w - held) ** 2) - 1)  # noqa: E731
    tx = ggd(l2_regression, soft, learning_rate=0.4, steps=500)
    w = _after(tx, error, start)
    total = lambda w: l2_regression.loss(key[0] @ w, -delta[0]) + soft(w, start) / 0.4  # noqa: E731
    assert_close(jax.grad(total)(w), jnp.zeros((K, V)), 1e-8)
    assert np.abs(w - _after(ggd(learning_rate=0.4), error, start)).max() > 1e-2


def test_the_memory_makes_the_value(pairs, rng):
    """v = k W - delta, where a step in the outputs' space leads: a regression on it forgets nothing of W."""
    start, key, delta = pairs
    eta = rng.uniform(0.2, 0.9, N)
    tx = ggd(l2_regression, 1, _led)
    assert_close(
        _after(tx, Outer(delta, key), start, eta=eta), _after(dgd(decay=False), Outer(delta, key), start, eta=eta)
    )


# --- as the rule of a level ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"retention": 3}, {"steps": 2}])
def test_as_the_rule_of_a_level(options, x64, rng):
    """Two heads, gates per token, chunks of two, reads after each write: regression errors at the chunk's start."""
    heads, length, size = 2, 5, 2
    window, steps = options.get("retention", 1), options.get("steps", 1)
    n = nest(level(linear_memory(K, V), ggd(HUBER, **options), size, objective=l2_regression, read="after"))
    key, query = rng.normal(size=(2, length, heads, K))
    value, start = rng.normal(size=(length, heads, V)), rng.normal(size=(heads, K, V))
    eta, alpha = rng.uniform(0.1, 0.5, (length, heads)), rng.uniform(0.6, 1, (length, heads))
    xs = Tokens(key, value, query, eta=eta, alpha=alpha)
    state, y = compiled(lambda w, xs: n.apply(n.init(({"w": w},)), xs))(start, xs)
    token = _by_steps(lambda r: np.clip(r, -0.5, 0.5), steps)
    for h in range(heads):
        w, deltas = start[h], []
        for t in range(length):
            at = w if t % size == 0 else at  # noqa: F821  (t = 0 comes first)
            deltas.append(key[t, h] @ at - value[t, h])
            w = _loop(start[h], key[: t + 1, h], deltas, eta[:, h], alpha[:, h], token, window)
            assert_close(y[t, h], query[t, h] @ w)
        assert_close(state.levels[0].running["w"][h], w)


RULES = [
    ggd(HUBER, 3),
    ggd(l2_regression, 2),
    ggd(huber_norm(), steps=2),
    ggd(lp_regression(1.5)),
    ggd(l2_regression, lambda w, held: jnp.sum((w - held) ** 4)),
    generalised_momentum(ggd(HUBER, 2)),
]


@pytest.mark.parametrize("i", [pytest.param(i, marks=[pytest.mark.slow] * (i in (2, 3))) for i in range(len(RULES))])
def test_zero_errors_have_finite_outer_gradients(i):
    """An empty memory is asked to remember zero, twice."""
    tx: Any = RULES[i]
    zero = Outer(jnp.zeros((2, V)), jnp.eye(K)[:2])

    def after(error, eta, w):
        step, state = tx.update(error, tx.init(w), w, eta=eta)
        again, _ = tx.update(error, state, w + step, eta=eta)
        return jnp.sum(w + step + again), (step, again)

    w = jnp.zeros((K, V))
    slopes, steps = compiled(jax.grad(after, (0, 1, 2), has_aux=True))(zero, jnp.full(2, 0.5), w)
    assert_close(steps, (w, w), 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes))
    assert np.any(slopes[0].delta != 0)


def _led(w, k, d):
    """The value k W - delta: where a step in the space of outputs leads."""
    return jnp.einsum("...k,...kv->...v", k, w) - d


OUTER = {
    "huber": ggd(HUBER, 1, _led),
    "window": ggd(l2_regression, 3, _led),
    "momentum": generalised_momentum(optax.chain(ggd(dot_product), retention(0.8))),
}


@pytest.mark.parametrize("name", OUTER)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_as_an_outer_optimizer(name, dtype, rng):
    """Factored errors of a layer under jit and scan: it fits, dtypes stay, strangers are not in the way."""
    x, target = jnp.asarray(rng.normal(size=(8, K)), dtype), jnp.asarray(rng.normal(size=(K, V)), dtype)
    tx: Any = OUTER[name]

    def step(carry, _):
        params, state = carry
        error = {"w": Outer(x @ (params["w"] - target), x)}
        u, state = tx.update(error, state, params, value=1.0, unknown=None, eta=jnp.float32(0.1))
        assert u["w"].dtype == dtype
        return (optax.apply_updates(params, u), state), None

    start = {"w": jnp.zeros((K, V), dtype)}
    (end, _), _ = jax.jit(lambda s: jax.lax.scan(step, s, length=600))((start, tx.init(start)))
    assert end["w"].dtype == dtype
    off = np.abs(np.float32(end["w"]) - np.float32(target)).max()  # bfloat16 loses steps below half its spacing
    assert off < (1e-2 if dtype == jnp.float32 else np.abs(np.float32(target)).max() / 4)


# --- generalised momentum --------------------------------------------------------------------------------------------


def test_a_regression_on_one_column_is_delta_momentum(x64, rng):
    """Key = gradient, value = -P with P = 1: the proximal step for alpha = 1."""
    gradients = rng.normal(size=(5, K, 1))
    tx: Any = generalised_momentum(ggd(learning_rate=0.3), keys="gradient")
    theirs = delta_momentum(0.3, 1.0, step="exact")
    state, other = tx.init(gradients[0]), theirs.init(gradients[0])
    both = compiled(lambda g, a, b: (tx.update(g, a), theirs.update(g, b)))
    for g in gradients:
        (u, state), (want, other) = both(g, state, other)
        assert_close(u, want)


def test_keys_are_the_columns_of_a_stack_of_gradients(x64, rng):
    """Column by column, values the rows of -I, with the gate alpha; any rule, here Huber's."""
    g, tx = rng.normal(size=(2, 2, K, V)), generalised_momentum(ggd(HUBER, learning_rate=0.3), keys="gradient")
    state, u = tx.init(g[0]), g[0]
    for x in g:
        u, state = tx.update(x, state, alpha=0.9)
    for i in range(2):
        m = np.zeros((K, V))
        for x in g[:, i]:
            args = x.T, np.eye(V), np.full(V, 0.3), np.full(V, 0.9)
            m = _loop(m, *args, _by_steps(lambda r: np.clip(r, -0.5, 0.5), 1))
        assert_close(np.asarray(u)[i], m)


@pytest.mark.parametrize("keys", ["input", pytest.param("gradient", marks=pytest.mark.slow)])
def test_generalised_momentum_as_the_rule_of_a_level(keys, x64, rng):
    """With a retained dot product it is the heavy ball, whichever the pairs: factors, or columns of their product."""
    key, value, start = rng.normal(size=(4, K)), rng.normal(size=(4, V)), rng.normal(size=(K, V))
    rule = optax.chain(ggd(dot_product, learning_rate=0.3), retention(0.8))
    names = generalised_momentum(rule, keys=keys), preconditioned_momentum(0.3, 0.8)
    got, want = (
        compiled(n.apply)(n.init(({"w": jnp.asarray(start)},)), Tokens(key, value))[0].levels[0].running
        for n in (nest(level(linear_memory(K, V), tx, 2, objective=l2_regression)) for tx in names)
    )
    assert_close(got, want)


# --- refusals --------------------------------------------------------------------------------------------------------

ERROR = Outer(jnp.ones((1, V)), jnp.ones((1, K)))
DENSE = jnp.ones((K, V))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: ggd(HUBER, 0), ValueError, "retention is a number of weights, at least 1.*0"),
        (lambda: ggd(HUBER, steps=0), ValueError, "steps=0"),
        (lambda: ggd(HUBER, learning_rate=-1.0), ValueError, "-1.0"),
        (lambda: _after(ggd(HUBER), ERROR, DENSE), ValueError, r"ggd\(learning_rate=...\) or .* eta="),
        (lambda: _after(ggd(HUBER, learning_rate=1.0), DENSE, DENSE), TypeError, "Outer.*not dense"),
        (lambda: ggd(HUBER).update(ERROR, ggd(HUBER).init(DENSE)), ValueError, "current weights"),
        (lambda: generalised_momentum(ggd(), keys="row"), ValueError, "'row'"),  # pyright: ignore
        (lambda: _after(generalised_momentum(ggd()), {"a": DENSE}, {"a": DENSE}), TypeError,
         r"keys='input'\) takes Outer.*a is an array of shape \(4, 3\)"),
        (lambda: _after(generalised_momentum(ggd(), "gradient"), {"a": ERROR}, {"a": DENSE}), TypeError,
         r"takes dense matrices.*a is an Outer"),
        (lambda: _after(generalised_momentum(ggd(HUBER), "gradient"), {"a": DENSE[0]}, {"a": DENSE[0]}), TypeError,
         r"a is an array of shape \(3,\)"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
