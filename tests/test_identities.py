"""The table of `hope_jax`: every line is the published recurrence, written here as a loop over tokens (spec 2.5)."""

import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hope_jax
from hope_jax import (
    SelfModifyingConfig,
    Tokens,
    Write,
    atlas,
    closed_loop,
    cms,
    cms_chain,
    cms_memory,
    cms_mixture,
    comba,
    delta_net,
    dgd,
    dgd_attention,
    dot_product,
    gated_delta_net,
    gated_linear_attention,
    heavy_ball,
    huber_norm,
    l2_regression,
    level,
    linear_attention,
    linear_attention_pp,
    linear_memory,
    longhorn,
    memora,
    mlp_memory,
    moneta,
    nest,
    newton_schulz,
    oja,
    omega,
    retention,
    retnet,
    scale_by_m3,
    self_modifying,
    softmax_attention,
    titans_lmm,
    ttt_linear,
    yaad,
)
from hope_jax.local import local_output
from hope_jax.models import ARCHITECTURES
from hope_jax.oja import oja_error
from hope_jax.sequence import deep_linear_attention, ttt_mlp
from hope_jax.writing import factored_errors
from tests import test_m3 as multi_scale
from tests import test_optimizer_identities as optimizers
from tests import test_recurrent as recurrent
from tests.models import test_blocks as blocks
from tests.models import test_titans_attention as titans_attention
from tests.models import test_window_attention as window_attention
from tests.oracles import (
    assert_close,
    cms_loop,
    compiled,
    float64,
    independent_token,
    mlp_gradient,
    mlp_read,
    nested_cms_loop,
    numpy64,
    polar5,
    self_modifying_loop,
    titans_loop,
)

K, V, F, T, C = 3, 2, 4, 7, 3  # C does not divide T: the last chunk stays open
MATRIX = linear_memory(K, V, 1.0)
MLP = mlp_memory(K, F)
ETA, ALPHA, MU = 0.3, 0.9, 0.6  # constants of rules that have no gates
WINDOW = 5  # of the Omega rule: over more than one chunk
FEEDBACK, CORRECTION = 0.7, 0.4  # b and d of Comba


# --- the published recurrences: (start weights, tokens) -> reads [T, V], last weights --------------------------------


def running(step):
    """S_t = step(S_{t-1}, k, v, eta, alpha), y_t = q_t S_t."""

    def loop(start, xs):
        s, ys = start["w"], []
        for t in range(T):
            s = step(s, xs.key[t], xs.value[t], *(None if g is None else g[t] for g in (xs.eta, xs.alpha)))
            ys.append(xs.query[t] @ s)
        return np.stack(ys), {"w": s}

    return loop


def step_linear_attention(s, k, v, eta, alpha):  # (64)
    return s + np.outer(k, v)


def step_retnet(s, k, v, eta, alpha):  # arXiv:2307.08621
    return ALPHA * s + np.outer(k, v)


def step_gated_linear_attention(s, k, v, eta, alpha):  # arXiv:2405.21060
    return alpha * s + eta * np.outer(k, v)


def step_delta_net(s, k, v, eta, alpha):  # arXiv:2406.06484
    return s - eta * np.outer(k, k @ s - v)


def step_gated_delta_net(s, k, v, eta, alpha):  # arXiv:2412.06464
    return (np.eye(K) - eta * np.outer(k, k)) @ (alpha * s) + eta * np.outer(k, v)


def step_longhorn(s, k, v, eta, alpha):  # arXiv:2407.14207
    eps = eta / (1 + eta * k @ k)
    return (np.eye(K) - eps * np.outer(k, k)) @ s + eps * np.outer(k, v)


def loop_ttt(start, xs):  # arXiv:2407.04620, mini-batches of C tokens
    w, ys = start, []
    for first in range(0, T, C):
        w0 = w
        for t in range(first, min(first + C, T)):
            gradient = mlp_gradient(w0, xs.key[t], mlp_read(w0, xs.key[t]) - xs.value[t])
            w = {n: w[n] - xs.eta[t] * gradient[n] for n in w}
            ys.append(mlp_read(w, xs.query[t]))
    return np.stack(ys), w


def loop_dla(start, xs):  # arXiv:2505.23735, the dot product -<M(k), v>
    w, ys = start, []
    for first in range(0, T, C):
        w0 = w
        for t in range(first, min(first + C, T)):
            gradient = mlp_gradient(w0, xs.key[t], -xs.value[t])
            w = {n: xs.alpha[t] * w[n] - xs.eta[t] * gradient[n] for n in w}
            ys.append(mlp_read(w0, xs.query[t]))
    return np.stack(ys), w


def loop_dgd(start, xs):  # (93), with the step of (57) for keys of any norm
    s, ys = start["w"], []
    for first in range(0, T, C):
        s0 = s
        for t in range(first, min(first + C, T)):
            k, v = xs.key[t], xs.value[t]
            eta = xs.eta[t] / (1 + xs.eta[t] * k @ k)
            s = (xs.alpha[t] * np.eye(K) - eta * np.outer(k, k)) @ s - eta * np.outer(k, k @ s0 - v)
            ys.append(xs.query[t] @ s0)
    return np.stack(ys), {"w": s}


def loop_titans(start, xs):
    constant = lambda gate, value: np.full(T, value) if gate is None else gate  # noqa: E731
    gates = {"eta": constant(xs.eta, ETA), "alpha": constant(xs.alpha, ALPHA), "mu": constant(xs.mu, MU)}
    return titans_loop(start, xs._replace(**gates), C)


def step_oja(s, k, v, eta, alpha):  # (66) for S = M^T
    return s @ (alpha * np.eye(V) - eta * np.outer(v, v)) + eta * np.outer(k, v)


def loop_comba(start, xs):  # arXiv:2506.02475
    s, ys = start["w"], []
    for t in range(T):
        k, v = xs.key[t], xs.value[t]
        s = (xs.alpha[t] * np.eye(K) - FEEDBACK * xs.eta[t] * np.outer(k, k)) @ s + xs.eta[t] * np.outer(k, v)
        ys.append((xs.query[t] - CORRECTION * k) @ s)
    return np.stack(ys), {"w": s}


def window_gradient(m, xs, t, weight):
    """sum_{i = t-c+1}^t weight_i grad l(m; k_i, v_i), of what there is."""
    total = {n: np.zeros_like(w) for n, w in m.items()}
    for i in range(max(t - WINDOW + 1, 0), t + 1):
        gradient = mlp_gradient(m, xs.key[i], mlp_read(m, xs.key[i]) - xs.value[i])
        total = {n: total[n] + weight[i] * gradient[n] for n in m}
    return total


def loop_omega(chunk_size):  # (68), gradients at the chunk's start
    def loop(start, xs):
        m, ys = start, []
        for t in range(T):
            m0 = m if t % chunk_size == 0 else m0  # noqa: F821  (t = 0 comes first)
            gradient = window_gradient(m0, xs, t, xs.eta)
            m = {n: xs.alpha[t] * m[n] - gradient[n] for n in m}
            ys.append(mlp_read(m0, xs.query[t]))
        return np.stack(ys), m

    return loop


def loop_atlas(start, xs):  # arXiv:2505.23735, one write per whole chunk
    m, s, ys = start, {n: np.zeros_like(w) for n, w in start.items()}, []
    for first in range(0, T, C):
        tokens = range(first, min(first + C, T))
        ys += [mlp_read(m, xs.query[t]) for t in tokens]
        if len(tokens) < C:
            continue
        gradients = [window_gradient(m, xs, t, np.ones(T)) for t in tokens]
        cut = slice(first, first + C)
        s = {n: np.prod(xs.mu[cut]) * s[n] + sum(g[n] for g in gradients) for n in m}
        m = {n: np.prod(xs.alpha[cut]) * m[n] - np.sum(xs.eta[cut]) * polar5(s[n]) for n in m}
    return np.stack(ys), m


def loop_miras(delta, link):  # arXiv:2504.13173
    def loop(start, xs):
        a, ys = start, []
        for first in range(0, T, C):
            w = {n: link(x) for n, x in a.items()}
            for t in range(first, min(first + C, T)):
                gradient = mlp_gradient(w, xs.key[t], delta(mlp_read(w, xs.key[t]) - xs.value[t]))
                a = {n: xs.alpha[t] * a[n] - xs.eta[t] * gradient[n] for n in a}
                ys.append(mlp_read(w, xs.query[t]))
        return np.stack(ys), a

    return loop


LOOP_MONETA = loop_miras(lambda r: np.sign(r) * np.abs(r) ** 2, lambda a: a / np.sum(np.abs(a) ** 4) ** (2 / 4))
LOOP_YAAD = loop_miras(lambda r: r * min(1, 1 / np.linalg.norm(r)), lambda a: a)
LOOP_MEMORA = loop_miras(lambda r: r, lambda a: np.exp(a) / np.exp(a).sum(axis=0))


# --- the table: name -> (recurrence, gates, forms in the words of the library) ---------------------------------------


def one(memory, rule, chunk_size, objective, read: Literal["start", "before", "after"] = "start"):
    return nest(level(memory, rule, chunk_size, objective=objective, read=read))


def in_loop(n):
    """A nest on Comba's tokens."""

    def apply(state, xs):
        return n.apply(state, closed_loop(xs, jnp.array(FEEDBACK), jnp.array(CORRECTION)))

    return n._replace(apply=apply)


CONSTANT_TITANS = optax.chain(optax.sgd(ETA), heavy_ball(MU), retention(ALPHA))
TITANS_RULE = dgd(exact=False, decay=False, momentum="gate")
GRADIENT_DESCENT = dgd(exact=False, decay=False)

TABLE = {
    "linear attention": (
        running(step_linear_attention),
        "",
        [one(MATRIX, optax.sgd(1.0), C, dot_product, "after"), linear_attention(K, V)],
    ),
    "RetNet": (
        running(step_retnet),
        "",
        [one(MATRIX, optax.chain(optax.sgd(1.0), retention(ALPHA)), C, dot_product, "after"), retnet(K, V, ALPHA)],
    ),
    "gated linear attention": (
        running(step_gated_linear_attention),
        "eta alpha",
        [one(MATRIX, GRADIENT_DESCENT, C, dot_product, "after"), gated_linear_attention(K, V)],
    ),
    "DeltaNet": (
        running(step_delta_net),
        "eta",
        [
            one(MATRIX, dgd(exact=False), C, dot_product, "after"),
            one(MATRIX, GRADIENT_DESCENT, 1, l2_regression, "after"),
            delta_net(K, V),
        ],
    ),
    "Gated DeltaNet": (
        running(step_gated_delta_net),
        "eta alpha",
        [
            one(MATRIX, dgd(exact=False, decayed_erase=True), C, dot_product, "after"),
            gated_delta_net(K, V),
        ],
    ),
    "Longhorn": (
        running(step_longhorn),
        "eta",
        [one(MATRIX, dgd(), C, dot_product, "after"), longhorn(K, V)],
    ),
    "TTT-Linear": (
        loop_ttt,
        "eta",
        [one(MATRIX, GRADIENT_DESCENT, C, l2_regression, "after"), ttt_linear(K, V, C)],
    ),
    "TTT-MLP, MLP memory": (
        loop_ttt,
        "eta",
        [one(MLP, GRADIENT_DESCENT, C, l2_regression, "after"), ttt_mlp(MLP, C)],
    ),
    "DLA, MLP memory": (
        loop_dla,
        "eta alpha",
        [one(MLP, GRADIENT_DESCENT, C, dot_product), deep_linear_attention(MLP, C)],
    ),
    "DGD on L2 (93)": (
        loop_dgd,
        "eta alpha",
        [one(MATRIX, dgd(), C, l2_regression, "start"), dgd_attention(K, V, C)],
    ),
    "Titans LMM": (
        loop_titans,
        "eta alpha mu",
        [one(MATRIX, TITANS_RULE, C, l2_regression), titans_lmm(MATRIX, C)],
    ),
    "Titans LMM, MLP memory": (
        loop_titans,
        "eta alpha mu",
        [one(MLP, TITANS_RULE, C, l2_regression), titans_lmm(MLP, C)],
    ),
    "Oja (66)": (
        running(step_oja),
        "eta alpha",
        [
            nest(level(MATRIX, GRADIENT_DESCENT, 1, read="after"), error=oja_error, output=local_output),
            oja(K, V),
        ],
    ),
    "Omega rule (68)": (loop_omega(C), "eta alpha", [omega(MATRIX, (K, V), C, WINDOW)]),
    "Omega rule (68), C = 1, MLP memory": (loop_omega(1), "eta alpha", [omega(MLP, (K, K), 1, WINDOW)]),
    "Atlas": (loop_atlas, "eta alpha mu", [atlas(MATRIX, (K, V), C, WINDOW)]),
    "Atlas, MLP memory": (loop_atlas, "eta alpha mu", [atlas(MLP, (K, K), C, WINDOW)]),
    "Moneta": (LOOP_MONETA, "eta alpha", [moneta(MATRIX, C)]),
    "Yaad, MLP memory": (LOOP_YAAD, "eta alpha", [yaad(MLP, C), one(MLP, GRADIENT_DESCENT, C, huber_norm())]),
    "Memora, MLP memory": (LOOP_MEMORA, "eta alpha", [memora(MLP, C)]),
    "Comba": (
        loop_comba,
        "eta alpha",
        [in_loop(one(MATRIX, dgd(exact=False), C, dot_product, "after")), in_loop(comba(K, V))],
    ),
    "Titans LMM, constant gates": (loop_titans, "", [one(MATRIX, CONSTANT_TITANS, C, l2_regression)]),
    "Titans LMM, MLP memory, constant gates": (loop_titans, "", [one(MLP, CONSTANT_TITANS, C, l2_regression)]),
}


@pytest.mark.parametrize("name, form", [(name, i) for name, (_, _, forms) in TABLE.items() for i in range(len(forms))])
def test_sequence_models(name, form, x64, rng):
    """Reads and last weights, from start weights that are not zero and keys that are not unit."""
    loop, gates, forms = TABLE[name]
    memory = MLP if "MLP" in name else MATRIX
    start = numpy64(memory.init(jax.random.key(0)))
    key, query = rng.normal(size=(2, T, K)) * 0.8
    value = rng.normal(size=(T, K if memory is MLP else V))
    ranges = {"eta": (0.1, 0.6), "alpha": (0.6, 1.0), "mu": (0.1, 0.9)}
    xs = Tokens(key, value, query, **{g: rng.uniform(*ranges[g], T) for g in gates.split()})
    n = forms[form]
    state, y = compiled(lambda p, xs: n.apply(n.init((p,)), xs))(float64(start), xs)
    want_y, want = loop(start, xs)
    last = state.levels[0]
    assert_close(y, want_y)
    assert_close(last.start if last.running is None else last.running, want)


def test_titans_without_momentum(x64, rng):
    """`titans_lmm(momentum=False)` is (T-16) before momentum."""
    start = numpy64(MATRIX.init(jax.random.key(0)))
    key, query = rng.normal(size=(2, T, K)) * 0.8
    gates = {"eta": rng.uniform(0.1, 0.5, T), "alpha": rng.uniform(0.6, 1, T)}
    xs = Tokens(key, rng.normal(size=(T, V)), query, **gates)
    n = titans_lmm(MATRIX, C, momentum=False)
    state, y = compiled(lambda p, xs: n.apply(n.init((p,)), xs))(float64(start), xs)
    want_y, want = loop_titans(start, xs._replace(mu=np.zeros(T)))
    assert_close(y, want_y)
    assert_close(state.levels[0].running, want)


# --- lines of their own ----------------------------------------------------------------------------------------------


def test_self_modifying_titans(x64, rng):
    """The nest of its five boxes, each a level of its own, written out from (83)-(88), is the layer and the loop."""
    config = SelfModifyingConfig(dim=K, memory_hidden=F, chunk_proj=2, chunk_mem=4, momentum=None, conv_window=0)
    layer = self_modifying(config)
    params = numpy64(layer.init(jax.random.key(0)))
    params["gates"] = jax.tree.map(lambda w: w + 0.3 * rng.normal(size=w.shape), params["gates"])
    gate = {name: (p["w"][0], p["b"][0]) for name, p in params["gates"].items()}
    unit = lambda a: a / jnp.sqrt(jnp.sum(a**2, -1, keepdims=True) + 1e-6)  # noqa: E731

    def error(boxes, carry, r):
        x = r / K**0.5
        k, v, for_eta, for_alpha = (MLP.apply(box, x) for box in boxes[:4])
        read = lambda name, out: out @ gate[name][0] + gate[name][1]  # noqa: E731
        gates = {
            "eta": jax.nn.softplus(read("eta", for_eta)),
            "log_alpha": jax.nn.log_sigmoid(read("alpha", for_alpha)),
        }
        y = MLP.apply(boxes[4], unit(r @ params["static"]["q"]))
        errors = [factored_errors(MLP, l2_regression, box, unit(k), MLP.apply(box, v))[1] for box in boxes]
        return tuple(Write(e, gates) for e in errors), carry, y

    rule = dgd(input_leaf="w2")
    n = nest(*(level(MLP, rule, c, objective=l2_regression) for c in (2, 2, 2, 2, 4)), error=error)
    boxes = tuple({w: a[0] for w, a in params["boxes"][b].items()} for b in ("k", "v", "eta", "alpha", "mem"))
    r = rng.normal(size=(8, K))
    _, y = compiled(lambda p, r: n.apply(n.init(p), r))(float64(boxes), r)
    _, y_layer = compiled(lambda p, r: layer.apply(p, layer.init_state(p), r))(float64(params), r)
    want = self_modifying_loop(config, params, r)
    assert_close(y, want)
    assert_close(y_layer, want)


def test_continuum_memory_system(x64, rng):
    """Global levels whose error is `jax.grad` of the chain's loss are `cms`, and (71) token by token."""
    sizes = (1, 2, 4)
    levels = [level(cms_memory(K, F), optax.sgd(0.2 / c), c) for c in sizes]

    def loss(params, x, target):
        y = cms_chain([lev.memory for lev in levels], params, x)
        return jnp.sum((y - target) ** 2) / 2, y

    def error(params, carry, xs):
        errors, y = jax.grad(loss, has_aux=True)(params, *xs)
        return errors, carry, y

    xs = tuple(rng.normal(size=(2, T, K)))
    by_hand, ready = nest(*levels, error=error), cms(*levels, loss=l2_regression.loss)
    params = float64(ready.params(jax.random.key(0)))
    want_y, history, _ = cms_loop(numpy64(params), xs[0], xs[1], sizes, 0.2)
    for n in (by_hand, ready):
        state, y = compiled(lambda p, xs, n=n: n.apply(n.init(p), xs))(params, xs)
        assert_close(y, want_y)
        assert_close([s.start for s in state.levels], history[-1])


def test_nested_continuum_memory_system(x64, rng):
    """A level that restarts the one before it, written with that one's errors, is what `cms` makes of "nested"."""
    sizes = (1, 2, 4)
    fast, middle, slow = levels = [level(cms_memory(K, F), optax.sgd(0.2 / c), c) for c in sizes]
    starts = [level(cms_memory(K, F), optax.sgd(0.2 / c), c, restarts=True) for c in sizes[1:]]

    def error(params, carry, xs):
        def loss(params):
            y = cms_chain([lev.memory for lev in levels], params, xs[0])
            return jnp.sum((y - xs[1]) ** 2) / 2, y

        (for_fast, for_middle, for_slow), y = jax.grad(loss, has_aux=True)(params[::2])
        return (for_fast, for_fast, for_middle, for_middle, for_slow), carry, y

    xs = tuple(rng.normal(size=(2, T, K)))
    ready = cms(*levels, loss=l2_regression.loss, variant="nested")
    by_hand = nest(fast, starts[0], middle, starts[1], slow, error=error)
    a, b, c = params = float64(ready.params(jax.random.key(0)))
    want_y, history = nested_cms_loop(numpy64(params), xs[0], xs[1], sizes, 0.2)
    for n, p in ((by_hand, (a, a, b, b, c)), (ready, params)):
        state, y = compiled(lambda p, xs, n=n: n.apply(n.init(p), xs))(p, xs)
        assert_close(y, want_y)
        assert_close([s.start for s in state.levels[::2]], history[-1][0])


def test_independent_continuum_memory_system(x64, rng):
    """Global levels whose error is `jax.grad` of the mixture's loss are `cms(variant="independent")`, and (74)."""
    sizes, logits = (1, 2, 4), rng.normal(size=3)
    levels = [level(cms_memory(K, F), optax.sgd(0.2 / c), c) for c in sizes]

    def error(params, carry, xs):
        def loss(params):
            y = cms_mixture([lev.memory for lev in levels], params, xs[0], carry)
            return jnp.sum((y - xs[1]) ** 2) / 2, y

        errors, y = jax.grad(loss, has_aux=True)(params)
        return errors, carry, y

    xs = tuple(rng.normal(size=(2, T, K)))
    by_hand, ready = nest(*levels, error=error), cms(*levels, loss=l2_regression.loss, variant="independent")
    params = float64(ready.params(jax.random.key(0)))
    token = lambda weights, x, target: independent_token(weights, x, target, logits)  # noqa: E731
    want_y, history, _ = cms_loop(numpy64(params), xs[0], xs[1], sizes, 0.2, token)
    for n in (by_hand, ready):
        state, y = compiled(lambda p, xs, n=n: n.apply(n.init(p, logits), xs))(params, xs)
        assert_close(y, want_y)
        assert_close([s.start for s in state.levels], history[-1])


def test_momentum(x64, rng):
    """(33): m <- alpha m - eta x delta^T. As optax.trace, as heavy_ball, and as a matrix memory written with the pairs
    (layer input, minus the error at its output), whose content is the update."""
    x, delta = rng.normal(size=(T, K)), rng.normal(size=(T, V))
    momentum = one(MATRIX, optax.chain(optax.sgd(ETA), retention(ALPHA)), 1, dot_product)
    state, _ = momentum.apply(momentum.init(({"w": jnp.zeros((K, V))},)), Tokens(x, -delta))
    m = np.zeros((K, V))
    for t in range(T):
        m = ALPHA * m - ETA * np.outer(x[t], delta[t])
    assert_close(state.levels[0].start["w"], m)
    for tx in (
        optax.chain(optax.trace(ALPHA), optax.scale(-ETA)),
        optax.sgd(ETA, ALPHA),
        optax.chain(optax.sgd(ETA), heavy_ball(ALPHA)),
    ):
        rule = tx.init(jnp.zeros((K, V)))
        for t in range(T):
            update, rule = tx.update(jnp.asarray(np.outer(x[t], delta[t])), rule)
        assert_close(update, m)


@pytest.mark.parametrize("mode", ["ema", "literal"])
def test_m3(mode, x64, rng):
    """(75): two levels whose data are an outer loop's gradients, read through Newton-Schulz, the slow at its start."""
    f, b1, b3, slow = 3, 0.8, 0.6, 0.3
    gradients = rng.normal(size=(T, K, V))
    retains = mode == "ema"
    rule = lambda eta, alpha: optax.chain(optax.sgd(eta), retention(alpha if retains else 1.0))  # noqa: E731

    def error(params, carry, gradient):
        m1, m2 = (p["m"] for p in params)
        (g,) = gradient  # one step
        now = b1 * m1 + (1 - b1) * g if retains else m1 + b1 * g
        return ({"m": -g}, {"m": -g}), carry, (newton_schulz(now) + slow * newton_schulz(m2))[None]

    fast = level(None, rule(1 - b1 if retains else b1, b1), 1)
    n = nest(fast, level(None, rule((1 - b3) / f if retains else b3, b3), f), error=error)
    state, y = compiled(lambda g: n.apply(n.init(({"m": jnp.zeros((K, V))},) * 2), g))(jnp.asarray(gradients))
    tx: Any = scale_by_m3(mode=mode, scales=(1, f), b1=b1, b3=b3, slow_weight=slow)
    outer, step = tx.init(jnp.zeros((K, V))), compiled(tx.update)
    for t in range(T):
        update, outer = step(gradients[t], outer)
        if mode == "ema":
            assert_close(update, 0.2 * y[t] / np.sqrt(np.mean(np.square(y[t]))), 1e-7)  # eps
        else:
            assert_close(update, y[t] / (np.sqrt(outer.square) + 0.1), 1e-12)
    assert_close([s.start["m"] for s in state.levels], [outer.momentum, outer.slow[0].momentum])
    assert_close(-state.levels[1].pending["m"], outer.slow[0].pending)


def test_mlp_block(x64, rng):
    """A level with learning rate 0 answers with its start weights for ever."""
    n = one(MLP, optax.sgd(0.0), 2, l2_regression, "after")
    params = float64(n.params(jax.random.key(0)))
    x, value = rng.normal(size=(2, T, K))
    state, y = compiled(lambda p, xs: n.apply(n.init(p), xs))(params, Tokens(x, value, x))
    assert_close(y, mlp_read(numpy64(params[0]), x))
    assert_close(state.levels[0].running, params[0], 0)


def test_linear_attention_pp(x64, rng):
    """(69) as one nest, and as two linear attentions, one reading for the other."""
    n, plain = linear_attention_pp(K), linear_attention(K, K)
    start = numpy64(n.params(jax.random.key(0))[0])
    assert not start["attention"].any()
    assert start["memory"].any()
    key, value, query = rng.normal(size=(3, T, K))
    xs = Tokens(key, value, query)
    a, s, want = start["attention"], start["memory"], []
    for t in range(T):
        a, s = (w + np.outer(key[t], value[t]) for w in (a, s))
        want.append((query[t] @ a) @ s)
    state, y = compiled(lambda p, xs: n.apply(n.init((p,)), xs))(float64(start), xs)
    assert_close(y, np.stack(want))
    assert_close(state.levels[0].running, {"attention": a, "memory": s})
    attend, recall = (plain.init(({"w": jnp.asarray(start[name])},)) for name in ("attention", "memory"))
    _, answer = plain.apply(attend, xs)
    assert_close(plain.apply(recall, xs._replace(query=answer))[1], np.stack(want))


@pytest.mark.parametrize("window", [None, 3])
def test_softmax_attention(window, x64, rng):
    """(62), (63): the least-squares fit of one vector to the values, weighted by exp(q . k / sqrt(K))."""
    query, key = rng.normal(size=(2, T, K))
    value = rng.normal(size=(T, V))
    y = softmax_attention(query, key, value, window)
    for t in range(T):
        seen = slice(0 if window is None else max(t - window + 1, 0), t + 1)
        root = np.exp(query[t] @ key[seen].T / np.sqrt(K) / 2)[:, None]
        m, *_ = np.linalg.lstsq(root, root * value[seen])
        assert_close(y[t], m[0], 1e-10)


# --- the table is complete --------------------------------------------------------------------------------------------

LINES = {
    "hope": "Hope",
    "hope_attention": "Hope-Attention",
    "self_modifying_titans": "self-modifying Titans",
    "titans": "Titans LMM",
    "titans_mac": "MAC",
    "titans_mag": "MAG",
    "titans_mal": "MAL",
    "ttt_linear": "TTT-Linear",
    "ttt_mlp": "TTT-MLP",
    "dla": "DLA",
    "omega": "Omega rule (68)",
    "atlas": "Atlas",
    "miras": "Moneta, Yaad, Memora",
    "comba": "Comba",
    "oja": "Oja (66)",
    "delta_net": "DeltaNet",
    "gated_delta_net": "Gated DeltaNet",
    "rwkv7": "RWKV-7",
    "mamba2": "Mamba-2",
    "retnet": "RetNet",
    "linear_attention": "linear attention",
    "linear_attention_pp": "Linear Attention++",
    "samba": "Samba",
    "swa": "sliding-window attention",
    "transformer": "Transformer",
    "lstm": "LSTM",
    "srwm": "SRWM",
}

OTHERS = {
    **{LINES[name]: blocks.test_a_block_is_the_loop for name in blocks.MIXERS},
    "MAC": titans_attention.test_memory_as_context,
    "RWKV-7": recurrent.test_rwkv7,
    "SRWM": recurrent.test_the_published_recurrence,
    "LSTM": recurrent.test_the_published_recurrence,
    "Linear Attention++": test_linear_attention_pp,
    "softmax attention": test_softmax_attention,
    "sliding-window attention": (test_softmax_attention, window_attention.test_the_loop_and_any_cut),
    "self-modifying Titans": test_self_modifying_titans,
    "CMS": test_continuum_memory_system,
    "nested CMS": test_nested_continuum_memory_system,
    "independent CMS": test_independent_continuum_memory_system,
    "momentum": (test_momentum, optimizers.test_momentum_is_a_retained_dot_product),
    "GGD (59)": optimizers.test_generalised_gradient_descent,
    "heavy ball": optimizers.test_heavy_ball_is_a_nest_of_two_levels,
    "delta momentum": optimizers.test_delta_momentum_is_dgd_on_a_momentum,
    "Muon": optimizers.test_muon_is_newton_schulz_of_linear_momentum,
    "Adam": (optimizers.test_adam_is_a_regression, optimizers.test_adam_is_read_from_two_levels),
    "RMSProp": optimizers.test_rmsprop_is_a_regression,
    "AdaGrad": optimizers.test_adagrad_is_a_regression,
    "M3 (75)": (test_m3, multi_scale.test_literal_is_algorithm_1, multi_scale.test_ema_is_its_loop),
    "MLP block": test_mlp_block,
}


def test_every_line_of_the_table_is_proven():
    """Names and numbers of forms, read from the docstring of `hope_jax`; and every architecture has a line."""
    assert hope_jax.__doc__
    _, _, table = hope_jax.__doc__.partition("What is known by other names")
    forms = {}
    for line in table.splitlines()[2:]:
        if named := re.match(r"    (\S.*?)  +\S", line):
            name = named[1]
            forms[name] = 1
        elif re.match(r" +=", line):
            forms[name] += 1
    assert len(forms) >= 23
    assert set(forms) == {name.partition(",")[0] for name in TABLE} | set(OTHERS)
    for name, count in forms.items():
        proven = sum(len(f) for row, (_, _, f) in TABLE.items() if row.partition(",")[0] == name)
        assert name in OTHERS or proven >= count
    assert set(LINES) == set(ARCHITECTURES)
    assert {name for line in LINES.values() for name in line.split(", ")} <= set(forms)
