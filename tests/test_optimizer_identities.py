"""Known optimizers as associative memories, step by step against NumPy loops and optax in float64 (spec 3.6, 4)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax import (
    Outer,
    contract,
    delta_momentum,
    dgd,
    dot_product,
    generalised_momentum,
    ggd,
    l2_regression,
    level,
    linear_memory,
    nest,
    output_momentum,
    retention,
)
from tests.oracles import assert_close, compiled, polar5, proximal

K, V, N = 4, 3, 8
ETA, ALPHA = 0.05, 0.8
B1, B2 = 0.9, 0.99


def _run(tx: Any, gradients, **extra) -> list:
    """The updates of a run from a fresh state, for weights that are zero."""
    params = jax.tree.map(jnp.zeros_like, extra.pop("params", gradients[0]))
    state, updates, update = tx.init(params), [], compiled(tx.update)
    for g in gradients:
        u, state = update(g, state, params, **extra)
        updates.append(u)
    return updates


def test_heavy_ball_is_a_nest_of_two_levels(x64, rng):
    """A fast level forgets and a slow one collects what it held; the model is their sum. Batches of two tokens."""
    fast = level(linear_memory(K, V), optax.chain(optax.sgd(ETA), retention(ALPHA)), 2)
    slow = level(linear_memory(K, V), optax.sgd(1.0), 2)

    def loss(w, xs):
        return jnp.sum((xs[0] @ w["w"] - xs[1]) ** 2) / 2

    def error(params_by_level, carry, xs):
        m, w = params_by_level
        g = jax.grad(loss)(jax.tree.map(jnp.add, w, m), xs)
        # a level's errors are sums over a chunk, so that a piece of it passes its share
        return (g, jax.tree.map(lambda m: -m * (len(xs[0]) / 2), m)), carry, ()

    n = nest(fast, slow, error=error)
    xs = rng.normal(size=(2 * N, K)), rng.normal(size=(2 * N, V))
    start = {"w": rng.normal(size=(K, V))}
    state, _ = compiled(lambda s, xs: n.apply(n.init(({"w": jnp.zeros((K, V))}, s)), xs))(start, xs)
    w, m, gradients = start["w"], np.zeros((K, V)), []
    for x, y in zip(*(a.reshape(N, 2, -1) for a in xs), strict=True):
        gradients.append(x.T @ (x @ w - y))
        m = ALPHA * m - ETA * gradients[-1]
        w = w + m
    assert_close(state.levels[0].start["w"] + state.levels[1].start["w"], w)
    assert_close(start["w"] + sum(_run(optax.sgd(ETA, momentum=ALPHA), gradients)), w)


def test_generalised_gradient_descent(x64, rng):
    """(59): the dot product is gradient descent, the regression delta gradient descent."""
    start, key, delta = rng.normal(size=(K, V)), rng.normal(size=(2, K)), rng.normal(size=(2, V))
    descent = regression = start
    for k, d in zip(key, delta, strict=True):
        descent = descent - ETA * np.outer(k, d)
        regression = regression - proximal(ETA, k) * np.outer(k, k @ regression + d)  # (S3.2)
    for objective, want in ((dot_product, descent), (l2_regression, regression)):
        rule = ggd(objective, learning_rate=ETA)
        assert_close(start + rule.update(Outer(delta, key), rule.init(start), start)[0], want)
    assert_close(start + dgd(ETA).update(Outer(delta, key), dgd(ETA).init(start), start)[0], regression)


def test_momentum_is_a_retained_dot_product(x64, rng):
    """(33), (37): the pairs of a batch are the layer's inputs and minus the errors at its output."""
    errors = [Outer(d, k) for d, k in zip(rng.normal(size=(N, 2, V)), rng.normal(size=(N, 2, K)), strict=True)]
    tx = generalised_momentum(optax.chain(ggd(dot_product, learning_rate=ETA), retention(ALPHA)))
    assert_close(
        _run(tx, errors, params=np.zeros((K, V))),
        _run(optax.sgd(ETA, momentum=ALPHA), [contract(e) for e in errors]),
    )


@pytest.mark.parametrize("step, alpha", [("explicit", ALPHA), ("damped", ALPHA), ("exact", 1.0)])
def test_delta_momentum_is_dgd_on_a_momentum(step, alpha, x64, rng):
    """Weights m, keys the columns of the gradient, errors I: dense `dgd` with gram = g g^T. For alpha below 1 `dgd`
    retains without the step in front, as (88) does, and only the first-order forms agree."""
    gradients = rng.normal(size=(N, K, V))
    rule: Any = dgd(exact=step == "exact")
    m, n, written, want = jnp.zeros((K, V)), np.zeros((K, V)), [], []
    for g in gradients:
        eta = ETA / (1 + ETA * np.sum(g**2)) if step == "damped" else ETA
        u, _ = rule.update(g, rule.init(m), m, gram=g @ g.T, eta=eta, alpha=alpha)
        m = m + u
        written.append(m)
        if step == "exact":
            n = np.linalg.solve(np.eye(K) + ETA * g @ g.T, alpha * n - ETA * g)
        else:
            n = alpha * n - eta * (g @ (g.T @ n) + g)  # (S4.1)
        want.append(n)
    assert_close(written, want)
    assert_close(_run(delta_momentum(ETA, alpha, step=step), gradients), want)


@pytest.mark.parametrize("shape", [(K, V), (V, K), (K, K)])
def test_muon_is_newton_schulz_of_linear_momentum(shape, x64, rng):
    """(42): large gradients, beside which the epsilons of the norms, 1e-7 here and there 1e-8, are nothing. Averages,
    bias corrections and sums differ by a factor, which Newton-Schulz does not see."""
    gradients = 1e9 * rng.normal(size=(N, *shape))
    ours, m = _run(output_momentum(ETA, B1), gradients), np.zeros(shape)
    for u, g in zip(ours, gradients, strict=True):
        m = B1 * m + g
        assert_close(u, -ETA * polar5(m))
    direction = optax.chain(optax.contrib.scale_by_muon(beta=B1, nesterov=False), optax.scale_by_learning_rate(ETA))
    with jax.numpy_rank_promotion("allow"):
        assert_close(ours, _run(direction, gradients), 1e-10)
        whole = _run(optax.contrib.muon(ETA, beta=B1, nesterov=False), gradients)
    wide = np.sqrt(max(1, shape[1] / shape[0]))  # optax' factor for the shape
    assert_close([wide * u for u in ours], whole, 1e-10)


def _regression(gradients, weights, targets, lam=0.0):
    """(101) of each element by least squares: argmin_u sum_i w_i (u g_i - P_i)^2 + lam u^2."""
    g = gradients.reshape(len(gradients), -1)
    u = np.zeros(g.shape[1])
    for j in range(g.shape[1]):
        root = np.sqrt(np.append(weights, lam))
        rows, to = np.append(g[:, j], 1.0), np.append(targets.reshape(len(g), -1)[:, j], 0.0)
        u[j] = np.linalg.lstsq((root * rows)[:, None], root * to)[0][0]
    return u.reshape(gradients.shape[1:])


def _latest(value, t):
    """Targets of steps 0 to t: zero but for the latest."""
    return np.concatenate([np.zeros((t, *value.shape)), value[None]])


def test_adam_is_a_regression(x64, rng):
    """(101), (105) with decay and bias correction: the target sqrt(v) on all gradients so far. Errors of step t - i
    weigh b2^i, and targets fade by (b1 / b2)^i, so that the first moment fades by b1."""
    gradients = rng.normal(size=(N, K, V))
    for t, u in enumerate(_run(optax.scale_by_adam(B1, B2, eps=0.0), gradients)):
        age = np.arange(t, -1, -1)
        norm1, norm2 = ((1 - b ** (t + 1)) / (1 - b) for b in (B1, B2))  # the sums of the weights
        v = np.einsum("i,ikv->kv", B2**age, gradients[: t + 1] ** 2) / norm2
        targets = (norm2 / norm1 * (B1 / B2) ** age)[:, None, None] * np.sqrt(v)
        assert_close(u, _regression(gradients[: t + 1], B2**age, targets))


def test_adam_is_read_from_two_levels(x64, rng):
    """Levels with retention remember g and g^2 by a dot product; (101) with P = sqrt(v) reads them in closed form."""
    gradients = rng.normal(size=(N, K, V))
    levels = [level(linear_memory(K, V), optax.chain(optax.sgd(1 - b), retention(b)), 1) for b in (B1, B2)]

    def error(params_by_level, carry, g):
        return ({"w": -g[0]}, {"w": -(g[0] ** 2)}), carry, ()

    n = nest(*levels, error=error)
    state, apply = n.init(({"w": jnp.zeros((K, V))},) * 2), compiled(n.apply)
    for t, u in enumerate(_run(optax.scale_by_adam(B1, B2, eps=0.0), gradients)):
        state, _ = apply(state, gradients[t : t + 1])
        m, v = (s.start["w"] / (1 - b ** (t + 1)) for s, b in zip(state.levels, (B1, B2), strict=True))
        assert_close(u, m * np.sqrt(v) / v)


def test_rmsprop_is_a_regression(x64, rng):
    """The same without the past of the first moment: all targets but the latest are zero."""
    gradients = rng.normal(size=(N, K, V))
    for t, u in enumerate(_run(optax.scale_by_rms(B2, eps=0.0), gradients)):
        weights = (1 - B2) * B2 ** np.arange(t, -1, -1)
        v = np.einsum("i,ikv->kv", weights, gradients[: t + 1] ** 2)
        assert_close(u, _regression(gradients[: t + 1], weights, _latest(np.sqrt(v) / (1 - B2), t)))


def test_adagrad_is_a_regression(x64, rng):
    """Nothing fades; lambda is the accumulator's start."""
    gradients, lam = rng.normal(size=(N, K, V)), 0.1
    for t, u in enumerate(_run(optax.scale_by_rss(lam, eps=0.0), gradients)):
        root = np.sqrt(np.sum(gradients[: t + 1] ** 2, axis=0) + lam)
        assert_close(u, _regression(gradients[: t + 1], np.ones(t + 1), _latest(root, t), lam))


def test_the_closed_form_of_the_regression_has_zero_gradient(x64, rng):
    """(101): m* = sum(g) P / (sum(g^2) + lambda), for any target P."""
    g, p, lam = rng.normal(size=(N, K)), rng.normal(size=K), 0.3
    loss = lambda m: jnp.sum((m * g - p) ** 2) + lam * jnp.sum(m**2)  # noqa: E731
    with jax.numpy_rank_promotion("allow"):
        slope = jax.grad(loss)(jnp.asarray(g.sum(0) * p / ((g**2).sum(0) + lam)))
    assert_close(slope, jnp.zeros(K))
