"""Rules: delta gradient descent is the step it claims to be (spec section 3), retention and momentum (2.4, 4.1)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax import Outer, dgd, heavy_ball, retention
from tests.oracles import assert_close, proximal, write

K, V, N = 4, 3, 6


def _step(tx: Any, updates, params, **extra) -> Any:
    """New weights after one update from a fresh state."""
    step, _ = tx.update(updates, tx.init(params), params, **extra)
    return optax.apply_updates(params, step)


def _proximal_minimiser(x, delta, start, eta, weight=1.0):
    """argmin_S weight/2 ||X S + Delta||^2 + 1/(2 eta) ||S - start||^2, as one stacked least-squares problem."""
    rows = np.concatenate([np.sqrt(weight) * x, np.eye(K) / np.sqrt(eta)])
    targets = np.concatenate([-np.sqrt(weight) * delta, start / np.sqrt(eta)])
    return np.linalg.lstsq(rows, targets)[0]


def _outer(delta: Any, key: Any) -> Outer:
    return Outer(delta, key)


@pytest.fixture
def start(x64, rng):
    return rng.normal(size=(K, V))


@pytest.mark.parametrize("norm", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("dense", [False, True])
def test_dgd_on_one_sample_is_the_proximal_minimiser(norm, dense, start, rng):
    x, delta = rng.normal(size=(1, K)), rng.normal(size=(1, V))
    x *= norm / np.linalg.norm(x)
    want = _proximal_minimiser(x, delta, start, eta=0.8)
    updates = {"w": x.T @ delta if dense else _outer(delta, x)}
    extra = {"gram": {"w": x.T @ x}} if dense else {}
    assert_close(_step(dgd(0.8), updates, {"w": start}, **extra)["w"], want)


@pytest.mark.parametrize("mean", [False, True])
def test_dgd_on_a_batch_is_exact(mean, start, rng):
    """Both closed forms of (S3.3) and the minimiser; with the mean loss A / N and the mean gradient."""
    x, delta, eta = rng.normal(size=(N, K)), rng.normal(size=(N, V)), 0.7
    n = N if mean else 1
    g, a = x.T @ delta / n, x.T @ x / n
    got = _step(dgd(eta), {"w": g}, {"w": start}, gram={"w": a})["w"]
    primal = np.linalg.solve(np.eye(K) + eta * a, start - eta * g)
    dual = start - eta / n * x.T @ np.linalg.solve(np.eye(N) + eta / n * x @ x.T, x @ start + delta)
    assert_close(got, primal)
    assert_close(got, dual)
    assert_close(got, _proximal_minimiser(x, delta, start, eta, 1 / n))


def test_dgd_first_order_on_a_batch(start, rng):
    """(S3.4), and its distance from the exact step falls by 4 when eta halves."""
    x, delta = rng.normal(size=(N, K)), rng.normal(size=(N, V))
    g, a = x.T @ delta, x.T @ x

    def both(eta):
        steps = [_step(dgd(eta, exact=e), {"w": g}, {"w": start}, gram={"w": a})["w"] for e in (False, True)]
        assert_close(steps[0], start - eta * (a @ start + g))
        return np.linalg.norm(steps[0] - steps[1])

    assert both(2e-4) / both(1e-4) == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("exact", [True, False])
def test_dgd_without_decay_is_sgd_with_the_same_steps(exact, start, rng):
    x, delta, eta = rng.normal(size=(N, K)), rng.normal(size=(N, V)), rng.uniform(0.1, 0.9, N)
    want = start
    for t in range(N):
        step = proximal(eta[t], x[t]) if exact else eta[t]
        want = optax.apply_updates(want, optax.sgd(step).update(np.outer(x[t], delta[t]), (optax.EmptyState(),) * 2)[0])
    assert_close(_step(dgd(exact=exact, decay=False), {"w": _outer(delta, x)}, {"w": start}, eta=eta)["w"], want)


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("momentum", [None, 0.6, "gate"])
def test_dgd_on_a_chunk_is_the_token_loop(decay, exact, momentum, start, rng):
    """Spec 3.5 with every gate per token, and a second chunk that goes on from the first one's momentum."""
    x, delta = rng.normal(size=(2, N, K)), rng.normal(size=(2, N, V))
    eta, alpha, mu = rng.uniform(0.1, 0.9, (2, N)), rng.uniform(0.6, 1, (2, N)), rng.uniform(0.1, 0.9, (2, N))
    if momentum != "gate":
        mu[:] = 0.0 if momentum is None else momentum
    tx: Any = dgd(exact=exact, decay=decay, momentum=momentum)
    params: Any = {"w": jnp.asarray(start)}
    state = tx.init(params)
    s, z = start, np.zeros((K, V))
    for i in range(2):
        gates = {"eta": eta[i], "alpha": alpha[i]} | ({"mu": mu[i]} if momentum == "gate" else {})
        step, state = tx.update({"w": _outer(delta[i], x[i])}, state, params, **gates)
        params = optax.apply_updates(params, step)
        for t in range(N):
            e = proximal(eta[i, t], x[i, t]) if exact else eta[i, t]
            s, z = write(s, z, x[i, t], -e * delta[i, t], e if decay else 0.0, alpha[i, t], mu[i, t])
    assert_close(params["w"], s)
    if momentum is not None:
        assert_close(state.momentum["w"], z)


def test_dgd_erases_from_the_decayed_state(start, rng):
    """Gated DeltaNet: S <- (I - eta k k^T) alpha S + eta k v^T."""
    k, v = rng.normal(size=(1, K)), rng.normal(size=(1, V))
    tx = dgd(0.3, exact=False, decayed_erase=True)
    want = (np.eye(K) - 0.3 * k.T @ k) @ (0.8 * start) + 0.3 * k.T @ v
    assert_close(_step(tx, {"w": _outer(-v, k)}, {"w": start}, alpha=0.8)["w"], want)


def test_one_key_sets_the_step_of_all_weights(start, rng):
    """(S7.5), (S7.6): `input_leaf` decays along its key; the others take its step size and no decay along theirs."""
    k, h = rng.normal(size=(N, K)), 2 * rng.normal(size=(N, 5))
    d2, d1 = rng.normal(size=(N, V)), rng.normal(size=(N, V))
    w1 = rng.normal(size=(5, V))
    got = _step(
        dgd(0.9, input_leaf="w2"), {"w2": _outer(d2, k), "w1": _outer(d1, h)}, {"w2": start, "w1": w1}, alpha=0.9
    )
    s2, s1 = start, w1
    for t in range(N):
        eta = proximal(0.9, k[t])
        s2, _ = write(s2, 0, k[t], -eta * d2[t], eta, 0.9)
        s1, _ = write(s1, 0, h[t], -eta * d1[t], 0.0, 0.9)
    assert_close(got, {"w2": s2, "w1": s1})


def test_an_exact_step_never_overshoots(start, rng):
    x, delta = 30 * rng.normal(size=(1, K)), rng.normal(size=(1, V))
    far = _step(dgd(1e6), {"w": _outer(delta, x)}, {"w": start})["w"]
    assert_close(x @ far, -delta, 1e-6)  # the target -delta up to 1 / (eta ||x||^2)


@pytest.mark.parametrize("options", [{}, {"decay": False}, {"exact": False}, {"decayed_erase": True}])
def test_dense_dgd_with_leading_axes_is_factored_dgd(options, x64, rng):
    """One token, two heads: gates [H, 1, 1] beside a dense gradient are gates [H, C] beside factors."""
    h = 2
    x, delta, start = rng.normal(size=(h, 1, K)), rng.normal(size=(h, 1, V)), rng.normal(size=(h, K, V))
    eta, alpha = rng.uniform(0.2, 0.8, (2, h, 1))
    tx: Any = dgd(**options)
    xt = np.swapaxes(x, -1, -2)
    for e, a, ed, ad in ((eta, alpha, eta[..., None], alpha[..., None]), (0.3, 0.8, 0.3, 0.8)):
        want = _step(tx, {"w": _outer(delta, x)}, {"w": start}, eta=e, alpha=a)
        got = _step(tx, {"w": xt @ delta}, {"w": start}, gram={"w": xt @ x}, eta=ed, alpha=ad)
        assert_close(got, want)


def test_dgd_on_weights_in_a_tuple(start, rng):
    x, delta = rng.normal(size=(1, K)), rng.normal(size=(1, V))
    tx: Any = dgd(0.5, momentum=0.5)
    want = _step(tx, {"w": _outer(delta, x)}, {"w": start})["w"]
    assert_close(_step(tx, (_outer(delta, x), (_outer(delta, x),)), (start, (start,))), (want, (want,)))


def test_the_gate_mu_overrides_the_momentum_of_dgd(start, rng):
    x, delta, mu = rng.normal(size=(N, K)), rng.normal(size=(N, V)), rng.uniform(0.1, 0.9, N)
    steps = [
        _step(dgd(0.5, momentum=m), {"w": _outer(delta, x)}, {"w": start}, **gates)
        for m, gates in (("gate", {"mu": mu}), (0.9, {"mu": mu}), (0.9, {"mu": 0 * mu, "log_mu": np.log(mu)}))
    ]
    assert_close(steps[1], steps[0])
    assert_close(steps[2], steps[0])


def test_gates_override_the_constants(x64):
    w = jnp.array([2.0])
    assert_close(_step(retention(0.9), jnp.zeros(1), w, alpha=0.5), jnp.array([1.0]))
    assert_close(_step(retention(0.9), jnp.zeros(1), w, alpha=0.1, log_alpha=np.log(0.5)), jnp.array([1.0]))
    tx: Any = heavy_ball(0.9)
    _, state = tx.update(w, tx.init(w), w)
    assert_close(tx.update(w, state, w, mu=0.5)[0], jnp.array([3.0]))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: dgd(0.1, momentum="Gate"), "'Gate'"),
        (lambda: dgd(0.1, momentum=1.5), "1.5"),
        (lambda: dgd(0.1, momentum=-0.5), "-0.5"),
        (lambda: dgd(-0.1), "-0.1"),
        (lambda: _step(dgd(0.1), jnp.ones((2, K, V)), jnp.ones((2, K, V)), gram=jnp.ones((2, K, K)), eta=jnp.ones(2)),
         r"eta is a scalar.*\(2,\)"),
    ],
)  # fmt: skip
def test_dgd_refuses_bad_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "tx, updates, extra, error, message",
    [
        (dgd(0.1), np.ones((K, V)), {}, TypeError, "gram=.*chain.*global level"),
        (dgd(0.1), np.ones((K, V)), {"inputs": {"w": np.ones((2, 5, K))}}, ValueError, "flatten batch and time"),
        (dgd(0.1), np.ones((K, V)), {n: {"w": np.eye(K)} for n in ("inputs", "gram")}, TypeError, "not both"),
        (dgd(0.1, momentum=0.9), np.ones((K, V)), {"gram": {"w": np.eye(K)}}, TypeError, "Outer"),
        (dgd(), _outer(np.ones((1, V)), np.ones((1, K))), {}, ValueError, "eta="),
        (dgd(0.1, momentum="gate"), _outer(np.ones((1, V)), np.ones((1, K))), {}, ValueError, "mu="),
        (dgd(0.1, input_leaf="x"), _outer(np.ones((1, V)), np.ones((1, K))), {}, ValueError, r"'x'.*\['w'\]"),
    ],
)
def test_dgd_says_what_it_needs(tx, updates, extra, error, message):
    params = {"w": np.zeros((K, V), np.float32)}
    with pytest.raises(error, match=message):
        tx.update({"w": updates}, tx.init(params), params, **extra)


def test_dgd_needs_the_weights():
    tx: Any = dgd(0.1)
    params = {"w": np.zeros((K, V), np.float32)}
    with pytest.raises(ValueError, match="current weights"):
        tx.update({"w": _outer(np.ones((1, V)), np.ones((1, K)))}, tx.init(params))


def test_retention_towards_zero_and_towards_the_start(x64):
    begin, now, g = jnp.array([1.0, -2.0]), jnp.array([3.0, 0.5]), jnp.array([0.1, 0.2])
    for towards, target in (("zero", 0.0), ("start", begin)):
        tx: Any = optax.chain(optax.sgd(1.0), retention(0.8, towards))
        step, _ = tx.update(g, tx.init(begin), now)
        assert_close(now + step, 0.8 * (now - target) + target - g)


def test_retention_takes_its_gate(x64):
    w = jnp.array([2.0])
    for gate in ({"alpha": 0.5}, {"log_alpha": np.log(0.5)}):
        assert_close(_step(retention(), jnp.zeros(1), w, **gate), jnp.array([1.0]))


def test_heavy_ball_is_titans_momentum_and_optax_trace(x64, rng):
    """Z <- mu Z - eta g; for constant eta the same as optax.trace followed by the step (spec 4.1)."""
    ours = optax.chain(optax.sgd(0.3), heavy_ball(0.7))
    gated = optax.chain(optax.sgd(0.3), heavy_ball())
    theirs = optax.chain(optax.trace(0.7), optax.scale(-0.3))
    w = jnp.zeros(3)
    states, z = [tx.init(w) for tx in (ours, gated, theirs)], np.zeros(3)
    for g in rng.normal(size=(4, 3)):
        z = 0.7 * z - 0.3 * g
        for i, (tx, gates) in enumerate(((ours, {}), (gated, {"mu": 0.7}), (theirs, {}))):
            step, states[i] = optax.with_extra_args_support(tx).update(g, states[i], w, **gates)
            assert_close(step, z, 1e-14)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: retention(0.0), "0.0"),
        (lambda: retention(1.5), "1.5"),
        (lambda: retention(0.5, "mean"), "'mean'"),
        (lambda: heavy_ball(1.0), "1.0"),
        (lambda: heavy_ball(-0.1), "-0.1"),
        (lambda: _step(retention(), jnp.zeros(1), jnp.zeros(1)), "alpha="),
        (lambda: _step(heavy_ball(), jnp.zeros(1), jnp.zeros(1)), "mu="),
        (lambda: retention(0.5).update(jnp.zeros(1), retention(0.5).init(jnp.zeros(1))), "current weights"),
    ],
)
def test_bad_constants_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


SHIPPED = {
    "dgd": dgd(0.1),
    "dgd_momentum": dgd(0.1, momentum=0.9),
    "retention": retention(0.9),
    "retention_start": retention(0.9, "start"),
    "heavy_ball": heavy_ball(0.9),
}


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_contract_of_every_rule(name, dtype):
    """Accepts arguments meant for others, keeps dtype and structure of updates and state, so that it scans."""
    tx: Any = SHIPPED[name]
    params = {"w": jnp.ones((K, V), dtype)}
    updates = {"w": jnp.ones((K, V), dtype)}
    if name.startswith("dgd"):
        updates = {"w": _outer(jnp.ones((2, V), dtype), jnp.ones((2, K), dtype))}

    def step(carry, _):
        params, state = carry
        gates = {"alpha": jnp.float32(0.9), "mu": jnp.float32(0.5)}
        step, state = tx.update(updates, state, params, value=1.0, unknown=None, **gates)
        assert step["w"].dtype == dtype and step["w"].shape == (K, V)
        return (optax.apply_updates(params, step), state), None

    (after, _), _ = jax.eval_shape(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=2), params)
    assert after["w"].dtype == dtype
