"""M3 against Algorithm 1, line by line in float64 (spec 4.8, tests 11 and 12)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax import hidden_matrices, m3, scale_by_m3
from tests.oracles import assert_close, compiled, primitives

F, STEPS = 5, 23  # slow period; not a multiple of it
B1, B2, B3, SLOW, EPS, LR = 0.7, 0.3, 0.6, 0.4, 0.2, 0.1
OPTIONS: dict[str, Any] = dict(scales=(1, F), b1=B1, b2=B2, b3=B3, slow_weight=SLOW, eps=EPS)
SHAPES = {"w": (3, 4), "stack": (2, 4, 3), "bias": (4,)}


def _ns(x):
    """Muon's quintic, one matrix."""
    if x.ndim > 2:
        return np.stack([_ns(m) for m in x])
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        a = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
        b = -4.7750 * a + 2.0315 * a @ a
        x = 3.4445 * x + (b @ x if x.shape[0] <= x.shape[1] else x @ b)
    return x


def _gradients(rng, n=STEPS, scale=1.0):
    return [{name: scale * rng.normal(size=s) for name, s in SHAPES.items()} for _ in range(n)]


def _start(rng):
    return {name: rng.normal(size=s) for name, s in SHAPES.items()}


def _run(tx, w, gradients):
    """Weights and states after each step."""
    step = compiled(lambda g, s, p: tx.update(g, s, p))
    w, state, history = jax.tree.map(jnp.asarray, w), tx.init(w), []
    for g in gradients:
        updates, state = step(g, state, w)
        w = optax.apply_updates(w, updates)
        history.append((w, state))
    return history


def _algorithm_1(w, gradients):
    """The published two loops: a slow write from the last f gradients, then f fast steps."""
    w, ns = dict(w), {name: _ns if len(s) > 1 else np.array for name, s in SHAPES.items()}
    for name in w:
        m1, v, m2, o2 = 0.0, 0.0, 0.0, 0.0
        for k in range(0, len(gradients), F):
            if k:
                m2 = m2 + B3 * sum(g[name] for g in gradients[k - F : k])
                o2 = ns[name](m2)
            for g in gradients[k : k + F]:
                m1 = m1 + B1 * g[name]
                v = v + B2 * g[name] ** 2
                w[name] = w[name] - LR * (ns[name](m1) + SLOW * o2) / (np.sqrt(v) + EPS)
    return w


def _ema(w, gradients, scales, betas, weights, decay=0.0, divide=False):
    """Our averages with any number of scales, one matrix or stack."""
    o: list[Any] = [0.0 for _ in scales]
    m, v = [np.zeros_like(w) for _ in scales], np.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        m[0] = betas[0] * m[0] + (1 - betas[0]) * g
        d = _ns(m[0]) + sum(a * x for a, x in zip(weights, o[1:], strict=True))
        v = B2 * v + (1 - B2) * g**2
        if divide:
            d = d / (np.sqrt(v / (1 - B2**t)) + EPS)
        rms = np.sqrt(np.mean(d**2, axis=(-2, -1), keepdims=True))
        w = w - LR * (0.2 * d / (rms + EPS) + decay * w)
        for i, f in enumerate(scales):
            if i and t % f == 0:
                m[i] = betas[i] * m[i] + (1 - betas[i]) * np.mean(gradients[t - f : t], axis=0)
                o[i] = _ns(m[i])
    return w


def test_literal_is_algorithm_1(x64, rng):
    """Every leaf of two or more axes through Newton-Schulz, a stack matrix by matrix, and the vector as it is."""
    w, gradients = _start(rng), _gradients(rng)
    got = _run(m3(LR, mode="literal", **OPTIONS), w, gradients)[-1][0]
    assert_close(got, _algorithm_1(w, gradients), 1e-12)


@pytest.mark.parametrize("scales, slow", [((1,), 0), ((1, F), 1), ((1, 2, F), 2)])
@pytest.mark.parametrize("divide", [False, True])
def test_ema_is_its_loop(scales, slow, divide, x64, rng):
    """One, two and three scales with numbers of their own; decay of the matrices, AdamW on the vector."""
    w, gradients, decay = _start(rng), _gradients(rng, 11), 0.3
    b3, weights = (0.6, 0.8)[:slow], (0.4, 0.7)[:slow]
    tx = m3(LR, scales=scales, b1=B1, b2=B2, b3=b3, slow_weight=weights, eps=EPS, divide=divide, weight_decay=decay)
    got = _run(tx, w, gradients)[-1][0]
    for name in ("w", "stack"):
        want = _ema(w[name], [g[name] for g in gradients], scales, (B1, *b3), weights, decay, divide)
        assert_close(got[name], want, 1e-12)
    adam = optax.adamw(LR, eps=EPS, eps_root=1e-16, weight_decay=0.0)
    want = _run(adam, w["bias"], [g["bias"] for g in gradients])[-1][0]
    assert_close(got["bias"], want, 1e-12)


@pytest.mark.parametrize("mode", ["ema", "literal"])
def test_the_slow_memory_changes_at_its_multiples_and_acts_from_the_next_step(mode, x64, rng):
    """Bit for bit, and its window is exactly F gradients: changing an older one or a newer one changes nothing."""
    w, gradients = rng.normal(size=(3, 4)), [rng.normal(size=(3, 4)) for _ in range(2 * F + 1)]
    tx: Any = scale_by_m3(mode=mode, **OPTIONS)
    other: dict[str, Any] = OPTIONS | {"slow_weight": 0.0}
    fast_only: Any = scale_by_m3(mode=mode, **other)
    step, fast_step = compiled(tx.update), compiled(fast_only.update)
    state, alone = tx.init(w), fast_only.init(w)
    for t, g in enumerate(gradients, 1):
        before, (u, state) = state, step(g, state)
        plain, alone = fast_step(g, alone)
        (old,), (new,) = before.slow, state.slow
        written = bool(np.any(old.momentum != new.momentum))
        assert written == (t % F == 0) == bool(np.any(old.direction != new.direction))
        assert bool(np.any(u != plain)) == (t > F)
        if written:
            window = sum(gradients[t - F : t])
            want = old.momentum + B3 * window if mode == "literal" else B3 * old.momentum + (1 - B3) * window / F
            assert_close(new.momentum, want, 1e-14)
            assert_close(new.pending, np.zeros((3, 4)), 0)
    assert int(state.count) == len(gradients)


def test_literal_ignores_the_gains_of_its_momenta(x64, rng):
    """Newton-Schulz ignores scale: b1 and b3 reach no matrix, b2 only rescales the learning rate."""
    w, gradients = _start(rng), _gradients(rng, 12, scale=10.0)  # far above the 1e-7 beside the norm

    def last(lr, **changed):
        options: dict[str, Any] = OPTIONS | {"eps": 0.0} | changed
        return _run(m3(lr, mode="literal", **options), w, gradients)[-1][0]

    base, other, rescaled = last(LR), last(LR, b1=0.05, b3=3.0), last(LR * 2, b2=4 * B2)
    for name in ("w", "stack"):
        assert_close(other[name], base[name], 1e-6)
        assert_close(rescaled[name], base[name], 1e-12)
    assert not np.allclose(other["bias"], base["bias"])


def test_literal_steps_shrink_and_are_inversely_proportional_to_the_gradients(x64, rng):
    """Nothing decays: with equal gradients step t is t^(-1/2) of the first. Gradients of a thousandth: 1,000 times."""
    g = rng.normal(size=(3, 4))
    options: dict[str, Any] = OPTIONS | {"eps": 0.0, "scales": (1,)}
    tx: Any = scale_by_m3(mode="literal", **options)
    state, steps = tx.init(g), []
    for _ in range(9):
        u, state = tx.update(g, state)
        steps.append(u)
    assert_close(steps[8], steps[0] / 3, 1e-5)  # the norm's 1e-7 in Newton-Schulz weighs differently
    small, _ = tx.update(g / 1000, tx.init(g))
    np.testing.assert_allclose(small, 1000 * steps[0], rtol=1e-3)


def test_a_step_of_every_matrix_has_rms_a_fifth_of_the_learning_rate(rng):
    """Whatever the gradients' scale, float32, with a schedule, on either side of a slow write."""
    w: Any = {name: jnp.zeros(s) for name, s in SHAPES.items()}
    tx: Any = m3(lambda count: 0.1 / (1 + count), scales=(1, 2))
    step = compiled(tx.update)
    for scale in (1e-6, 1.0, 1e6):
        state = tx.init(w)
        for t, g in enumerate(_gradients(rng, 4, scale)):
            updates, state = step(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g), state, w)
            for name in ("w", "stack"):
                rms = np.sqrt(np.mean(np.square(updates[name]), axis=(-2, -1)))
                np.testing.assert_allclose(rms, 0.2 * 0.1 / (1 + t), rtol=1e-4)


def test_slow_newton_schulz_runs_at_its_boundary_only():
    """Products of matrices: five steps of three for the fast momentum outside, as many in one branch, none waiting."""
    tx: Any = scale_by_m3(scales=(1, F))
    w = jnp.ones((3, 4))
    jaxpr = jax.make_jaxpr(tx.update)(w, tx.init(w)).jaxpr
    (cond,) = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    wait, step = (primitives(b.jaxpr) for b in cond.params["branches"])
    assert "dot_general" in step
    assert "dot_general" not in wait
    assert sum(e.primitive.name == "dot_general" for e in jaxpr.eqns) == 15


def test_defaults_are_m3():
    w = jnp.ones((2, 3))
    state: Any = scale_by_m3().init(w)
    assert len(state.slow) == 1 and state.square is None
    history = _run(scale_by_m3(), w, [np.asarray(w, np.float32)] * 33)
    written = [bool(np.any(s.slow[0].direction)) for _, s in history]
    assert written == [False] * 31 + [True] * 2


@pytest.mark.parametrize("options", [{}, {"divide": True}, {"mode": "literal"}, {"mode": "literal", "eps": 1e-8}])
def test_zero_gradients_have_a_finite_outer_gradient(options):
    """With every square root of the options at zero."""
    tx: Any = scale_by_m3(scales=(1, 2), ns=("quintic", 1), **options)

    def outer(g):
        u, state = tx.update(g, tx.init(g))
        v, _ = tx.update(g, state)
        return jnp.sum(u + 2 * v)

    value, slope = compiled(jax.value_and_grad(outer))(jnp.zeros((2, 3)))
    assert value == 0
    assert np.all(np.isfinite(slope)) and np.all(slope != 0)


def test_one_scale_is_muon_with_steps_of_equal_rms(rng):
    """Against `optax.contrib.muon`, whose width factor the rms replaces."""
    g = [jnp.asarray(rng.normal(size=(4, 6)), jnp.float32) for _ in range(3)]
    w: Any = jnp.zeros((4, 6))
    ours, theirs = scale_by_m3(scales=(1,), b1=0.9), optax.contrib.scale_by_muon(beta=0.9, nesterov=False)
    a, b = ours.init(w), theirs.init(w)
    steps = compiled(lambda x, a, b: (ours.update(x, a), theirs.update(x, b)))
    for x in g:
        (u, a), (v, b) = steps(x, a, b)
        np.testing.assert_allclose(u, 0.2 * v / np.sqrt(np.mean(np.square(v))), atol=1e-5)


# --- which parameters are matrices ------------------------------------------------------------------------------------

HALF: Any = (1, 2.5)
W = {"wq": jnp.ones((2, 3)), "norm": {"scale": jnp.ones((2, 3))}, "bias": jnp.ones(3)}


def _slow_leaves(tx, w):
    """Paths of what has a slow memory."""
    slow = tx.init(w).inner_states["matrix"].inner_state[0].slow[0].momentum
    return [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(slow)]


def test_labels_by_default_by_tree_and_by_function():
    assert _slow_leaves(m3(LR), W) == ["wq"]
    assert _slow_leaves(m3(LR, labels={"wq": "other", "norm": "matrix", "bias": "other"}), W) == ["norm/scale"]
    by_shape = lambda p: jax.tree.map(lambda x: "matrix" if x.ndim == 2 else "other", p)  # noqa: E731
    assert _slow_leaves(m3(LR, labels=by_shape), W) == ["norm/scale", "wq"]


@pytest.mark.parametrize("path, shape, want", [
    ("blocks/mixer/wq", (2, 8, 8), "matrix"),
    ("blocks/mlp/w_gate", (8, 8), "matrix"),  # a gated MLP's, not a gate of a memory
    ("Dense_0/kernel", (8, 8), "matrix"),
    ("Dense_0/bias", (8,), "other"),
    ("blocks/mixer/memory/boxes/k/w1", (2, 4, 8, 8), "matrix"),
    ("attention/heads/w", (4, 8, 8), "matrix"),
    ("embedding", (64, 8), "other"),
    ("Embed_0/embedding", (64, 8), "other"),
    ("pos_embed", (64, 8), "other"),
    ("head", (8, 64), "other"),
    ("lm_head/kernel", (8, 64), "other"),
    ("wte", (64, 8), "other"),
    ("blocks/norm/scale", (2, 8), "other"),
    ("LayerNorm_0/scale", (2, 8), "other"),
    ("blocks/memory/gates/alpha/w", (2, 8, 4), "other"),
    ("blocks/memory/conv/q", (2, 4, 4, 8), "other"),
    ("Conv_0/kernel", (3, 3, 8, 8), "other"),
    ("shift/k_scale", (2, 8), "other"),
    ("projection", (8, 1), "other"),
    ("scalar", (), "other"),
])  # fmt: skip
def test_hidden_matrices_by_name_and_shape(path, shape, want):
    tree: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    for name in reversed(path.split("/")):
        tree = {name: tree}
    assert jax.tree.leaves(hidden_matrices(tree)) == [want]


def test_inside_a_partition(rng):
    """A part of a larger optimizer: other leaves are masked away from it."""
    tx: Any = optax.partition(
        {"m3": m3(LR), "sgd": optax.sgd(1.0)}, lambda p: {"wq": "m3", "norm": "sgd", "bias": "m3"} if p else {}
    )
    updates, _ = compiled(tx.update)(W, tx.init(W), W)
    assert_close(updates["norm"], {"scale": -W["norm"]["scale"]}, 0)
    part = {"wq": W["wq"], "bias": W["bias"]}
    alone, _ = compiled(m3(LR).update)(part, m3(LR).init(part), part)
    assert_close({name: updates[name] for name in part}, alone, 1e-7)


@pytest.mark.parametrize("make, message", [
    (lambda: m3(LR, mode="exact"), 'modes "ema" and "literal"; got mode=\'exact\''),
    (lambda: m3(LR, scales=(2, 4)), r"1 first, then growing.*got \(2, 4\)"),
    (lambda: m3(LR, scales=(1, 4, 4)), r"got \(1, 4, 4\)"),
    (lambda: m3(LR, scales=HALF), r"got \(1, 2.5\)"),
    (lambda: m3(LR, scales=()), r"got \(\)"),
    (lambda: m3(LR, b3=(0.9, 0.9)), r"b3 is one number or one for each of the 1 slow scales; got \(0.9, 0.9\)"),
    (lambda: m3(LR, scales=(1, 2, 4), slow_weight=(0.1,)), "slow_weight.*each of the 2"),
    (lambda: m3(LR, b1=1.5), r"b1 is a decay in \[0, 1\).*got 1.5"),
    (lambda: m3(LR, b3=-0.1), r"b3 is a decay.*got -0.1"),
    (lambda: m3(LR, ns=("quartic", 5)), "'quartic'"),
    (lambda: m3(LR, ns=("quintic", 0)), "got 0"),
    (lambda: m3(LR, mode="literal", weight_decay=0.1), "no weight decay; got weight_decay=0.1"),
    (lambda: m3(LR, mode="literal", divide=True), "divide"),
    (lambda: m3(LR, labels=lambda p: jax.tree.map(lambda _: "other", p)).init(W), "none of.*bias, .*wq.*optax.adamw"),
    (lambda: m3(LR, labels=lambda p: jax.tree.map(lambda _: "muon", p)).init(W), "bias has the label 'muon'"),
    (lambda: m3(LR, labels={"wq": "matrix", "norm": "other", "bias": "matrix"}).init(W),
     r"bias has shape \(3,\): label it \"other\""),
    (lambda: scale_by_m3().init({"layer": {"bias": jnp.ones(3)}}), r"layer/bias has shape \(3,\)"),
])  # fmt: skip
def test_refuses_with_the_value_and_the_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()
