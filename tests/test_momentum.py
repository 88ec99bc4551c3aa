"""Momentum as memory: each rule is its formula in the paper's layout (columns, G = g^T), float64 (spec 4.1-4.5)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax import (
    Tokens,
    delta_momentum,
    feature_momentum,
    l2_regression,
    learned_preconditioner,
    level,
    linear_memory,
    nest,
    newton_schulz,
    output_momentum,
    preconditioned_momentum,
)
from hope_jax.linear_rules import linear_form
from hope_jax.momentum import cubic_feature
from tests.oracles import assert_close, compiled, descend

K, V, N = 4, 3, 5
ETA, ALPHA = 0.3, 0.8
STEPS = ("damped", "explicit", "exact")


def _run(tx: Any, gradients, params=None, **extra) -> tuple[list, Any]:
    """The updates of a run from a fresh state, and the last state."""
    params = jnp.zeros_like(gradients[0]) if params is None else params
    state, updates, update = tx.init(params), [], tx.update
    for g in gradients:
        u, state = update(g, state, params, **extra)
        updates.append(u)
    return updates, state


def _momentum_loop(gradients, eta: Any = ETA, alpha=ALPHA):
    m, ms = np.zeros_like(gradients[0]), []
    for t, g in enumerate(gradients):
        step: Any = eta(t) if callable(eta) else eta
        m = alpha * m - step * g
        ms.append(m)
    return ms


def _columns(step, gradients, eta: Any = ETA, alpha=ALPHA, p=None):
    """(S4.1) in the paper's layout, m [V, K]; gradients [K, V]."""
    m, ms = np.zeros_like(gradients[0]).T, []
    p = np.eye(len(m)) if p is None else p
    for t, g in enumerate(gradients):
        big = g.T
        e: Any = eta(t) if callable(eta) else eta
        if step == "exact":
            m = (alpha * m - e * p @ big) @ np.linalg.inv(np.eye(m.shape[1]) + e * big.T @ big)
        else:
            e = e / (1 + e * np.sum(big**2)) if step == "damped" else e
            m = m @ (alpha * np.eye(m.shape[1]) - e * big.T @ big) - e * p @ big
        ms.append(m.T)
    return ms


# --- momentum and what is written into it ---------------------------------------------------------------------------


def test_without_a_preconditioner_it_is_optax_momentum(x64, rng):
    gradients = rng.normal(size=(N, K, V))
    theirs, _ = _run(optax.chain(optax.trace(ALPHA), optax.scale(-ETA)), gradients)
    for tx in (
        preconditioned_momentum(ETA, ALPHA),
        preconditioned_momentum(ETA, ALPHA, precondition=optax.identity()),
        feature_momentum(ETA, ALPHA, phi=lambda g: g),
        output_momentum(ETA, ALPHA, sigma=lambda m: m),
    ):
        assert_close(_run(tx, gradients)[0], theirs, 1e-14)


def test_a_schedule_scales_what_is_written(x64, rng):
    """m <- alpha m - eta_t g, and not eta_t times a trace; a sum, so that the last bit may differ."""
    gradients, schedule = rng.normal(size=(N, K, V)), lambda t: 0.5 / (1.0 + t)
    want = _momentum_loop(gradients, schedule)
    assert_close(_run(preconditioned_momentum(schedule, ALPHA), gradients)[0], want)
    assert_close(_run(delta_momentum(schedule, ALPHA), gradients)[0], _columns("damped", gradients, schedule))
    read = _run(output_momentum(schedule, ALPHA, sigma=jnp.tanh), gradients)[0]
    assert_close(read, [schedule(t) * np.tanh(m) for t, m in enumerate(_momentum_loop(gradients, 1.0))])


def test_preconditioned_momentum_is_a_gradient_step_on_its_memory(x64, rng):
    """(47): on <m G^T, P> in columns, with retention, for a fixed matrix P."""
    gradients, p = rng.normal(size=(N, K, V)), rng.normal(size=(V, V))
    left = optax.stateless_with_tree_map(lambda g, _: g @ p.T)  # P G of the paper
    m = np.zeros((V, K))
    for g, u in zip(gradients, _run(preconditioned_momentum(ETA, ALPHA, precondition=left), gradients)[0], strict=True):
        loss = lambda m, g=g: jnp.sum((m @ g) * p)  # noqa: E731
        m = ALPHA * m - ETA * jax.grad(loss)(jnp.asarray(m))
        assert_close(u.T, m, 1e-14)


@pytest.mark.parametrize("key", ["unit", "newton_schulz"])
def test_learned_preconditioner_regresses_gradients_on_their_keys(key, x64, rng):
    """(39)-(41) in columns, one matrix of a stack at a time; read before it is written."""
    zeta, gradients = 0.4, rng.normal(size=(N, 2, K, V))
    options = {} if key == "unit" else {"key": newton_schulz}
    updates, state = _run(learned_preconditioner(zeta, **options), gradients)
    for i in range(2):
        p = np.eye(V)
        for g, u in zip(gradients[:, i], updates, strict=True):
            assert_close(u[i].T, p @ g.T)
            k = g.T / np.linalg.norm(g) if key == "unit" else np.asarray(newton_schulz(g)).T
            loss = lambda p, k=k, g=g: jnp.sum((p @ k - g.T) ** 2) / 2  # noqa: E731
            p = p - zeta * np.asarray(jax.grad(loss)(jnp.asarray(p)))
        assert_close(state.memory[i], p)


def test_momentum_of_a_learned_preconditioner(x64, rng):
    gradients = rng.normal(size=(N, K, V))
    pg, _ = _run(learned_preconditioner(0.4), gradients)
    ours, _ = _run(preconditioned_momentum(ETA, ALPHA, precondition=learned_preconditioner(0.4)), gradients)
    assert_close(ours, _momentum_loop(np.stack(pg)))
    delta, _ = _run(delta_momentum(ETA, ALPHA, step="explicit", precondition=learned_preconditioner(0.4)), gradients)
    m = np.zeros((K, V))
    for g, p, u in zip(gradients, pg, delta, strict=True):
        m = ALPHA * m - ETA * g @ (g.T @ m) - ETA * np.asarray(p)
        assert_close(u, m)


def test_feature_momentum_writes_features(x64, rng):
    """m <- alpha m - eta P phi(G), phi(g) = g + 0.1 g^3 / rms^2; P a matrix."""
    gradients, p = 3 * rng.normal(size=(N, K, V)), rng.normal(size=(V, V))
    left = optax.stateless_with_tree_map(lambda g, _: g @ p.T)
    features = np.stack([g + 0.1 * g**3 / np.mean(g**2) for g in gradients])
    assert_close(_run(feature_momentum(ETA, ALPHA), gradients)[0], _momentum_loop(features))
    both, _ = _run(feature_momentum(ETA, ALPHA, precondition=left), gradients)
    assert_close(both, _momentum_loop(features @ p.T))


def test_the_cubic_feature_is_odd_increasing_and_of_each_matrix(x64, rng):
    phi, g = cubic_feature(0.3), rng.normal(size=(2, K, V))
    assert_close(phi(-g), -phi(g), 0)
    assert_close(phi(g), jnp.stack([phi(x) for x in g]))
    assert_close(phi(1e-4 * g), 1e-4 * phi(g), 1e-4 * 1e-5)  # of one degree: eps is 1e-7 of rms^2
    line = np.linspace(-3, 3, 101)
    assert np.all(np.diff(np.asarray(phi(jnp.asarray(line)))) > 0)
    assert_close(phi(jnp.asarray(line)), line * (1 + 0.3 * line**2 / np.mean(line**2)))


def test_output_momentum_reads_through_a_function(x64, rng):
    gradients = rng.normal(size=(N, K, V))
    traces = _momentum_loop(gradients, 1.0)
    for sigma, read in ((jnp.tanh, np.tanh), (jnp.sign, np.sign), (lambda m: m + 1, lambda m: m + 1)):
        assert_close(_run(output_momentum(ETA, ALPHA, sigma=sigma), gradients)[0], [ETA * read(m) for m in traces])
    scaled, _ = _run(output_momentum(ETA, ALPHA, sigma=jnp.tanh, precondition=optax.scale(0.1)), gradients)
    assert_close(scaled, [ETA * np.tanh(0.1 * m) for m in traces])


# --- delta momentum --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("shape", [(K, V), (V, K)])
def test_delta_momentum_is_its_formula_in_columns(step, shape, x64, rng):
    gradients, p = rng.normal(size=(N, *shape)), rng.normal(size=(shape[1], shape[1]))
    left = optax.stateless_with_tree_map(lambda g, _: g @ p.T)
    assert_close(_run(delta_momentum(ETA, ALPHA, step=step), gradients)[0], _columns(step, gradients), 1e-11)
    with_p, _ = _run(delta_momentum(ETA, ALPHA, step=step, precondition=left), gradients)
    assert_close(with_p, _columns(step, gradients, p=p), 1e-11)


@pytest.mark.parametrize("step", STEPS)
def test_delta_momentum_of_stacks_vectors_and_scalars(step, x64, rng):
    """Matrices of a stack are independent; a vector is G of one row, a scalar of one number."""
    stack, vector, scalar = rng.normal(size=(N, 2, K, V)), rng.normal(size=(N, K)), rng.normal(size=N)
    tree = [{"stack": a, "vector": b, "scalar": jnp.asarray(c)} for a, b, c in zip(stack, vector, scalar, strict=True)]
    params = jax.tree.map(jnp.zeros_like, tree[0])
    updates, _ = _run(delta_momentum(ETA, ALPHA, step=step), tree, params)
    for i in range(2):
        assert_close([u["stack"][i] for u in updates], _columns(step, stack[:, i]))
    assert_close([u["vector"][:, None] for u in updates], _columns(step, vector[..., None]))
    assert_close([u["scalar"][None, None] for u in updates], _columns(step, scalar[:, None, None]))


def test_the_explicit_step_is_a_gradient_step(x64, rng):
    """On 1/2 ||m G^T + P||^2 with P = I, from a momentum that is not zero."""
    first, g = rng.normal(size=(2, K, V))
    _, m = _run(delta_momentum(ETA, ALPHA, step="explicit"), [first, g])[0]
    start = jnp.asarray(-ETA * first)
    loss = lambda m: jnp.sum((m.T @ g + jnp.eye(V)) ** 2) / 2  # noqa: E731
    assert_close(m, ALPHA * start - ETA * jax.grad(loss)(start), 1e-12)


@pytest.mark.parametrize("shape", [(K, V), (V, K)])
def test_the_exact_step_is_stationary(shape, x64, rng):
    """Of 1/2 ||m G^T + P||^2 + 1 / (2 eta) ||m - alpha m_t||^2, whatever the size of the gradient."""
    first, g = rng.normal(size=(2, *shape))
    before, m = _run(delta_momentum(ETA, ALPHA, step="exact"), [first, 10 * g])[0]

    def loss(m):
        return jnp.sum((m.T @ (10 * g) + jnp.eye(shape[1])) ** 2) / 2 + jnp.sum((m - ALPHA * before) ** 2) / (2 * ETA)

    assert_close(jax.grad(loss)(m), jnp.zeros(shape), 1e-11)  # gradients of order 1e2


def test_damped_is_exact_for_rank_one_without_forgetting(x64, rng):
    gradients = np.einsum("tk,tv->tkv", rng.normal(size=(N, K)), rng.normal(size=(N, V)))
    damped, exact = (_run(delta_momentum(0.7, 1.0, step=s), gradients)[0] for s in ("damped", "exact"))
    assert_close(damped, exact)


def test_damped_is_a_contraction(x64, rng):
    """The transition matrix of m, read off from m = I with P = 0, has spectral radius below one for every gradient."""
    tx: Any = delta_momentum(1.0, precondition=optax.scale(0.0))
    update = compiled(tx.update)
    for alpha in (0.5, 0.99, 1.0):
        for scale in (1e-1, 1e0, 1e1, 1e2, 1e3):
            g = jnp.asarray(scale * rng.normal(size=(K, K)))
            transition, _ = update(g, tx.init(g)._replace(momentum=jnp.eye(K)), mu=alpha)
            eta = 1 / (1 + np.sum(g**2))
            assert np.abs(np.linalg.eigvals(transition)).max() < 1
            assert_close(np.linalg.eigvalsh(transition), alpha - eta * np.linalg.eigvalsh(g @ g.T)[::-1])


@pytest.mark.parametrize("step", STEPS)
def test_constant_gradients_settle_where_the_formula_says(step, x64, rng):
    """m* = -eta G ((1 - alpha) I + eta G^T G)^-1, with the damped eta for the damped step; bounded as stated."""
    big = rng.normal(size=(V, K)) * 0.4
    eta = ETA / (1 + ETA * np.sum(big**2)) if step == "damped" else ETA
    tx: Any = delta_momentum(ETA, ALPHA, step=step)
    run = lambda s, _: (tx.update(jnp.asarray(big.T), s)[1], None)  # noqa: E731
    state, _ = jax.lax.scan(run, tx.init(jnp.zeros((K, V))), length=300)  # 0.8^300 = 1e-29
    want = -eta * big @ np.linalg.inv((1 - ALPHA) * np.eye(K) + eta * big.T @ big)
    assert_close(state.momentum.T, want, 1e-10)
    assert np.linalg.norm(state.momentum, 2) <= np.sqrt(eta / (1 - ALPHA)) / 2


def test_the_curved_valley(x64):
    """(53): damped delta momentum is at the optimum long before momentum of the same constants (spec 4.3, test 49)."""

    def psi(x):
        r, theta = x
        return r**2 + (r - theta + jnp.sin(5 * r)) ** 2

    def steps(tx):
        def step(carry, _):
            x, state = carry
            u, state = tx.update(jax.grad(psi)(x), state)
            return (x + u, state), jnp.linalg.norm(x + u)

        start = jnp.array([-3.5, 2.0])
        distance = jax.lax.scan(step, (start, tx.init(start)), length=2000)[1]
        return 1 + int(np.argmax(np.asarray(distance) < 1e-3))

    delta, momentum = steps(delta_momentum(0.01, 0.99)), steps(preconditioned_momentum(0.01, 0.99))
    assert abs(delta - 561) <= 1
    assert delta < momentum
    assert 1000 < momentum < 2000


# --- as inner rules --------------------------------------------------------------------------------------------------


def _written(rule: str, m, g, eta, mu):
    """(m, update) of one token, columns or rows alike."""
    if rule == "delta":
        e = eta / (1 + eta * np.sum(g**2))
        m = mu * m - e * g @ (g.T @ m) - e * g
        return m, m
    if rule == "output":
        m = mu * m - g
        return m, eta * np.tanh(m)
    m = mu * m - eta * (g + 0.1 * g**3 / np.mean(g**2) if rule == "feature" else g)
    return m, m


INNER = {
    "preconditioned": preconditioned_momentum(),
    "delta": delta_momentum(),
    "feature": feature_momentum(),
    "output": output_momentum(sigma=jnp.tanh),
}


@pytest.mark.parametrize("rule", ["preconditioned", "delta", pytest.param("feature", marks=pytest.mark.slow), "output"])
def test_as_the_rule_of_a_level(rule, x64, rng):
    """Gates eta and mu of every token, gradients at the chunk's start, two heads, a call that ends inside a chunk."""
    heads, length, size = 2, 5, 2
    memory = linear_memory(K, V)
    n = nest(level(memory, INNER[rule], size, objective=l2_regression, read="after"))
    key, query = rng.normal(size=(2, length, heads, K))
    value = rng.normal(size=(length, heads, V))
    eta, mu = rng.uniform(0.1, 0.5, (2, length, heads))
    start = rng.normal(size=(heads, K, V))
    xs = Tokens(key, value, query, eta=eta, mu=mu)
    state, y = compiled(lambda w, xs: n.apply(n.init(({"w": w},)), xs))(start, xs)
    for h in range(heads):
        w, m = start[h], np.zeros((K, V))
        for t in range(length):
            at = w if t % size == 0 else at  # noqa: F821  (t = 0 comes first)
            g = np.outer(key[t, h], key[t, h] @ at - value[t, h])
            m, u = _written(rule, m, g, eta[t, h], mu[t, h])
            w = w + u
            assert_close(y[t, h], query[t, h] @ w)
        assert_close(state.levels[0].running["w"][h], w)


def test_what_is_linear_needs_no_token_loop():
    params = {"w": jnp.zeros((K, V))}
    assert linear_form(preconditioned_momentum(ETA, ALPHA), params, ()) is not None
    assert linear_form(preconditioned_momentum(), params, ("eta", "mu")) is not None
    assert linear_form(delta_momentum(ETA, ALPHA), params, ()) is None


# --- as outer optimizers ---------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Any] = {
    "preconditioned": preconditioned_momentum(0.05),
    "schedule": preconditioned_momentum(optax.constant_schedule(0.05)),
    "learned": preconditioned_momentum(0.05, precondition=learned_preconditioner(0.1)),
    "damped": delta_momentum(0.1),
    "explicit": delta_momentum(0.01, step="explicit"),
    "exact": delta_momentum(optax.cosine_decay_schedule(0.1, 400), step="exact"),
    "feature": feature_momentum(0.05),
    "sign": output_momentum(optax.linear_schedule(0.1, 0.0, 300), 0.9, sigma=jnp.sign),
    "tanh": output_momentum(0.05, 0.9, sigma=jnp.tanh),
}


SIMILAR = ("preconditioned", "explicit", "feature", "sign")  # to others that are trained


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SIMILAR)) for n in OPTIMIZERS])
def test_trains_under_jit_and_scan(name):
    """A stack of matrices, a vector and a scalar of two dtypes reach their targets; strangers are not in the way."""
    tx, rng = OPTIMIZERS[name], np.random.default_rng(0)
    numbers = {"m": rng.normal(size=(2, 4, 3)), "v": rng.normal(size=5), "s": rng.normal()}
    target: Any = {
        dtype: jax.tree.map(lambda x, d=dtype: jnp.asarray(x, d), numbers) for dtype in ("float32", "bfloat16")
    }
    target = {**target, "none": None, "masked": optax.MaskedNode()}
    end = descend(tx, target, 400)
    for dtype, tolerance in (("float32", 1e-2), ("bfloat16", 0.1)):
        off = jax.tree.map(lambda a, b: np.abs(np.float32(a) - np.float32(b)).max(), end[dtype], target[dtype])
        assert max(jax.tree.leaves(off)) < tolerance


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zero_gradients_give_finite_updates_and_outer_gradients(name):
    """Two steps at exactly zero: nothing moves, and what the gradients would have done is finite."""
    tx = OPTIMIZERS[name]
    zero = {"m": jnp.zeros((2, 3)), "v": jnp.zeros(3), "s": jnp.zeros(()), "e": jnp.zeros((0, 3)), "o": jnp.zeros(0)}

    def moved(g):
        state = tx.init(g)
        u, state = tx.update(g, state, g)
        w, _ = tx.update(g, state, g)
        return sum(jnp.sum(x) for x in jax.tree.leaves((u, w))), (u, w)

    slope, updates = compiled(jax.grad(moved, has_aux=True))(zero)
    assert_close(updates, (zero, zero), 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))
    assert any(np.any(x != 0) for x in jax.tree.leaves(slope)) or name == "sign"


@pytest.mark.parametrize(
    "make, static, numbers",
    [
        (preconditioned_momentum, (), {"learning_rate": 0.1, "alpha": 0.5}),
        (delta_momentum, (), {"learning_rate": 0.1, "alpha": 0.5}),
        (feature_momentum, ("phi",), {"learning_rate": 0.1, "alpha": 0.5}),
        (output_momentum, ("sigma",), {"learning_rate": 0.1, "alpha": 0.5}),
        (learned_preconditioner, ("key",), {"zeta": 0.1}),
    ],
)
def test_hyperparameters_can_be_injected(make, static, numbers):
    g = {"w": jnp.ones((2, 3), jnp.bfloat16)}
    plain, injected = make(**numbers), optax.inject_hyperparams(make, static_args=static)(**numbers)
    states = [tx.init(g) for tx in (plain, injected)]
    for _ in range(2):
        (a, states[0]), (b, states[1]) = (
            jax.jit(tx.update)(g, s, g) for tx, s in zip((plain, injected), states, strict=True)
        )
        assert b["w"].dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(a["w"]), np.float32(b["w"]), rtol=2**-6)  # the numbers are bfloat16 too


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: preconditioned_momentum(-0.1), "preconditioned_momentum's learning_rate.*-0.1"),
        (lambda: preconditioned_momentum(0.1, 1.0), r"preconditioned_momentum's alpha .*\[0, 1\); got 1.0"),
        (lambda: feature_momentum(0.1, -0.5), "feature_momentum's alpha.*-0.5"),
        (lambda: output_momentum(0.1, 2), "output_momentum's alpha.*2"),
        (lambda: delta_momentum(0.1, 1.1), r"delta_momentum's alpha .*\[0, 1\]; got 1.1"),
        (lambda: delta_momentum(0.1, step="implicit"), "\"damped\", \"explicit\" or \"exact\"; got 'implicit'"),
        (lambda: learned_preconditioner(-1.0), "zeta.*-1.0"),
        (lambda: cubic_feature(-0.1), "increases; got -0.1"),
        (lambda: _run(delta_momentum(), [jnp.ones(2)]), r"delta_momentum\(learning_rate=...\) or .* eta="),
        (lambda: _run(feature_momentum(), [jnp.ones(2)]), r"feature_momentum\(learning_rate=...\) or .* eta="),
        (lambda: _run(output_momentum(0.1), [{"a": {"b": jnp.ones(2)}}], {"a": {"b": jnp.ones(2)}}),
         r"sigma does not take a/b, of shape \(2,\): newton_schulz needs matrices.*optax.partition"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
