"""The table of `hope_jax`: every line is the published recurrence, written here as a loop over tokens (spec 2.5)."""

import re
from typing import Literal

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
    cms,
    cms_chain,
    cms_memory,
    delta_net,
    dgd,
    dgd_attention,
    dot_product,
    gated_delta_net,
    gated_linear_attention,
    heavy_ball,
    l2_regression,
    level,
    linear_attention,
    linear_memory,
    longhorn,
    mlp_memory,
    nest,
    retention,
    retnet,
    self_modifying,
    titans_lmm,
    ttt_linear,
)
from hope_jax.writing import factored_errors
from tests.oracles import (
    assert_close,
    cms_loop,
    compiled,
    float64,
    mlp_gradient,
    mlp_read,
    numpy64,
    self_modifying_loop,
)

K, V, F, T, C = 3, 2, 4, 7, 3  # C does not divide T: the last chunk stays open
MATRIX = linear_memory(K, V, 1.0)
MLP = mlp_memory(K, F)
ETA, ALPHA, MU = 0.3, 0.9, 0.6  # constants of rules that have no gates


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


def loop_ttt_linear(start, xs):  # arXiv:2407.04620, mini-batches of C tokens
    w, ys = start["w"], []
    for first in range(0, T, C):
        w0 = w
        for t in range(first, min(first + C, T)):
            w = w - xs.eta[t] * np.outer(xs.key[t], xs.key[t] @ w0 - xs.value[t])
            ys.append(xs.query[t] @ w)
    return np.stack(ys), {"w": w}


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


def loop_titans(start, xs):  # Titans T-13, T-14, T-16: surprise with memory, forgetting, gradients at the chunk's start
    constant = lambda gate, value: np.full(T, value) if gate is None else gate  # noqa: E731
    eta, alpha, mu = constant(xs.eta, ETA), constant(xs.alpha, ALPHA), constant(xs.mu, MU)
    m, s, ys = start, {n: np.zeros_like(w) for n, w in start.items()}, []
    for first in range(0, T, C):
        m0 = m
        for t in range(first, min(first + C, T)):
            gradient = mlp_gradient(m0, xs.key[t], mlp_read(m0, xs.key[t]) - xs.value[t])
            s = {n: mu[t] * s[n] - eta[t] * gradient[n] for n in m}
            m = {n: alpha[t] * m[n] + s[n] for n in m}
            ys.append(mlp_read(m0, xs.query[t]))
    return np.stack(ys), m


# --- the table: name -> (recurrence, gates, forms in the words of the library) ---------------------------------------


def one(memory, rule, chunk_size, objective, read: Literal["start", "before", "after"] = "start"):
    return nest(level(memory, rule, chunk_size, objective=objective, read=read))


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
        loop_ttt_linear,
        "eta",
        [one(MATRIX, GRADIENT_DESCENT, C, l2_regression, "after"), ttt_linear(K, V, C)],
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
    assert_close(y, want_y)
    assert_close(state.levels[0].running, want)


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


def test_mlp_block(x64, rng):
    """A level with learning rate 0 answers with its start weights for ever."""
    n = one(MLP, optax.sgd(0.0), 2, l2_regression, "after")
    params = float64(n.params(jax.random.key(0)))
    x, value = rng.normal(size=(2, T, K))
    state, y = compiled(lambda p, xs: n.apply(n.init(p), xs))(params, Tokens(x, value, x))
    assert_close(y, mlp_read(numpy64(params[0]), x))
    assert_close(state.levels[0].running, params[0], 0)


# --- the table is complete --------------------------------------------------------------------------------------------

OTHERS = {
    "self-modifying Titans": test_self_modifying_titans,
    "CMS": test_continuum_memory_system,
    "momentum": test_momentum,
    "MLP block": test_mlp_block,
}


def test_every_line_of_the_table_is_proven():
    """Names and numbers of forms, read from the docstring of `hope_jax`."""
    assert hope_jax.__doc__
    _, _, table = hope_jax.__doc__.partition("What is known by other names")
    forms = {}
    for line in table.splitlines()[2:]:
        if named := re.match(r"    (\S.*?)  +\S", line):
            name = named[1]
            forms[name] = 1
        elif re.match(r" +=", line):
            forms[name] += 1
    assert len(forms) >= 13
    assert set(forms) == {name.partition(",")[0] for name in TABLE} | set(OTHERS)
    for name, count in forms.items():
        proven = sum(len(f) for row, (_, _, f) in TABLE.items() if row.partition(",")[0] == name)
        assert name in OTHERS or proven >= count
