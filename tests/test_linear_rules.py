"""Which optax transformations run chunk-parallel, and that those give what their own token loop gives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hope_jax.writing
from hope_jax import Outer, Tokens, dgd, heavy_ball, l2_regression, level, linear_memory, mlp_memory, nest, retention
from hope_jax.linear_rules import linear_form
from hope_jax.types import Write
from hope_jax.writing import write_chunk
from tests.oracles import assert_close, compiled, float64

K, F, T, C = 3, 4, 8, 4
MEMORY = mlp_memory(K, F)
SHAPES = jax.eval_shape(MEMORY.init, jax.random.key(0))

LINEAR = {
    "sgd": optax.sgd(0.1),
    "sgd_momentum": optax.sgd(0.1, 0.9),
    "weight_decay": optax.chain(optax.sgd(0.1), optax.add_decayed_weights(-0.05)),
    "decay_before_step": optax.chain(optax.add_decayed_weights(0.3), optax.sgd(0.1)),
    "lmm": optax.chain(optax.sgd(0.1), heavy_ball(0.8), retention(0.9)),
    "trace": optax.chain(optax.trace(0.5), optax.scale(-0.2)),
    "masked": optax.chain(optax.masked(optax.scale(0.5), {"w1": True, "w2": False}), optax.sgd(0.1)),
    "partitioned": optax.partition({"a": optax.sgd(0.1), "b": optax.sgd(0.3)}, {"w1": "a", "w2": "b"}),
}
GATED = {
    "retention": (optax.chain(optax.sgd(0.1), retention()), ("alpha",)),
    "lmm_gates": (optax.chain(optax.sgd(0.1), heavy_ball(), retention()), ("mu", "alpha")),
}
NOT_LINEAR = {
    "adam": optax.adam(0.1),
    "rmsprop": optax.rmsprop(0.1),
    "nesterov": optax.sgd(0.1, 0.9, nesterov=True),
    "clip": optax.chain(optax.clip(1.0), optax.sgd(0.1)),
    "global_norm": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "schedule": optax.sgd(optax.linear_schedule(0.1, 0.0, 10)),
    "centralize": optax.chain(optax.centralize(), optax.sgd(0.1)),
    "ema": optax.chain(optax.ema(0.9), optax.sgd(0.1)),
    "sign": optax.sign_sgd(0.1),
    "decay_into_momentum": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, 0.9)),
    "two_momenta": optax.chain(optax.trace(0.5), optax.trace(0.9), optax.scale(-0.1)),
    "pull_to_the_start": optax.chain(optax.sgd(0.1), retention(0.9, "start")),
    "negative_momentum": optax.sgd(0.1, momentum=-0.5),
    "momentum_of_a_frozen_weight": optax.chain(
        optax.trace(0.5), optax.masked(optax.set_to_zero(), {"w1": True, "w2": False})
    ),
    "distant_threshold": optax.chain(optax.clip(1e6), optax.sgd(0.1)),
    "too_much_decay": optax.chain(optax.sgd(0.1), optax.add_decayed_weights(-1.5)),
}


@pytest.mark.parametrize("name", [*LINEAR, *GATED])
def test_recognises_linear_rules(name):
    tx = LINEAR[name] if name in LINEAR else GATED[name][0]
    assert linear_form(tx, SHAPES) is not None


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_leaves_the_rest_to_the_token_loop(name):
    assert linear_form(NOT_LINEAR[name], SHAPES) is None


def _stateless(update) -> optax.GradientTransformationExtraArgs:
    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _by_width(updates, state, params=None, **_):
    return jax.tree.map(lambda u: -u / u.shape[-2], updates), state


def _by_gain(updates, state, params=None, *, gain=0.2, **_):
    return jax.tree.map(lambda u: -gain * u, updates), state


def _by_gram(updates, state, params=None, *, gram=None, **_):
    step = lambda u, a=None: -0.1 * u if a is None else -0.1 * (u + a @ u)  # noqa: E731
    return (jax.tree.map(step, updates) if gram is None else jax.tree.map(step, updates, gram)), state


def _alpha_overwrites(updates, state, params=None, *, alpha=0.5, **_):
    """Alpha at the second probe is not positive."""
    return jax.tree.map(lambda u, p: u - 10 * (alpha > 0.8) * p, updates, params), state


def _shifted_momentum(updates, state, params=None, *, mu=0.5, **_):
    z = jax.tree.map(lambda u, m: u + (2 * mu - 1) * m, updates, state)
    return jax.tree.map(lambda z: -z, z), z


PROBED = {
    "gram": (_stateless(_by_gram), ()),
    "second_probe": (_stateless(_alpha_overwrites), ("alpha",)),
    "second_probe_momentum": (
        optax.GradientTransformationExtraArgs(lambda params: jax.tree.map(jnp.zeros_like, params), _shifted_momentum),
        ("mu",),
    ),
    "gates_and_width": (optax.chain(_stateless(_by_width), retention()), ("alpha",)),
    "dgd_in_a_chain": (optax.chain(dgd(0.1), optax.scale(0.5)), ()),
}


@pytest.mark.parametrize("name", PROBED)
def test_probes_every_gate_and_what_only_the_token_loop_passes(name):
    tx, gates = PROBED[name]
    assert linear_form(tx, SHAPES, gates) is None


@pytest.mark.parametrize("shape, dtype", [((2, 0), jnp.float32), ((2, 2), jnp.int32), ((2,), jnp.float32)])
def test_weights_that_are_no_matrices_have_no_form(shape, dtype):
    assert linear_form(optax.sgd(0.1), {"w": jax.ShapeDtypeStruct(shape, dtype)}) is None


def test_numbers_are_those_of_the_real_shapes(rng):
    """A mask by the number of axes, and a step size that divides by the width."""
    mask = lambda tree: jax.tree.map(lambda x: x.ndim == 3, tree)  # noqa: E731
    tx = optax.chain(_stateless(_by_width), optax.masked(optax.scale(3.0), mask))
    errors = {
        "a": Outer(jnp.ones((C, F)), jnp.ones((C, K))),
        "b": Outer(jnp.ones((2, C, F)), jnp.ones((2, C, K))),
    }
    form = linear_form(tx, {"a": jnp.zeros((K, F)), "b": jnp.zeros((2, K, F))}, ())
    assert form is not None
    recs = form.recurrences(errors, {})
    assert_close((recs["a"].write, recs["b"].write), (-jnp.ones((C, F)) / K, -3 * jnp.ones((2, C, F)) / K), 1e-6)


def test_a_form_takes_factors_only():
    form = linear_form(optax.sgd(0.1), SHAPES, ())
    assert form is not None
    with pytest.raises(TypeError, match=r"local level's errors must be Outer"):
        form.recurrences(jax.tree.map(lambda s: jnp.ones(s.shape), SHAPES), {})


def _written(tx, gates, key, delta) -> jax.Array:
    lev = level(linear_memory(K, K), tx, C, objective=l2_regression)
    w = {"w": jnp.eye(K)}
    return write_chunk(lev, w, tx.init(w), Write({"w": Outer(delta, key)}, gates))[0]["w"]


def test_any_gate_reaches_the_rule(x64, rng):
    key, delta, gain = *rng.normal(size=(2, C, K)), rng.uniform(size=C)
    for tx in (_stateless(_by_gain), optax.chain(_stateless(_by_gain), optax.clip(1e9))):
        assert_close(_written(tx, {"gain": gain}, key, delta), np.eye(K) - (gain[:, None] * key).T @ delta)


@pytest.mark.parametrize("tx", [optax.chain(optax.sgd(0.1), retention()), dgd(0.1)])
def test_forgetting_everything_has_finite_gradients(tx, rng):
    key, delta = jnp.asarray(rng.normal(size=(2, C, K)), jnp.float32)
    gradient = jax.grad(lambda a: jnp.sum(_written(tx, {"alpha": a}, key, delta)))(jnp.array([0.5, 0.0, 1.0, 0.9]))
    assert bool(jnp.all(jnp.isfinite(gradient)))


def test_a_gate_overrides_the_constant(x64, rng):
    """With a chunk form and without, and the log form counts before the plain one."""
    key, delta, alpha = *rng.normal(size=(2, C, K)), rng.uniform(0.5, 1, C)
    want = _written(optax.chain(optax.sgd(0.1), retention()), {"alpha": alpha}, key, delta)
    gates = {"alpha": np.ones(C), "log_alpha": np.log(alpha)}
    for tx in (
        optax.chain(optax.sgd(0.1), retention(0.3)),
        optax.chain(optax.sgd(0.1), retention(0.3), optax.clip(1e9)),
        dgd(0.1, exact=False, decay=False),
    ):
        assert_close(_written(tx, gates, key, delta), want)


def test_recognises_inside_jit():
    @jax.jit
    def recognised(x):
        assert linear_form(optax.sgd(0.1, 0.9), SHAPES) is not None
        return x

    recognised(jnp.zeros(()))


def test_a_rule_without_weights_has_no_form():
    assert linear_form(optax.sgd(0.1), {}) is None


def test_a_learned_learning_rate_goes_through_the_token_loop(x64, rng):
    """A traced number closed over by a transformation cannot be probed; its outer gradient is exact all the same."""
    x = rng.normal(size=(4, K))

    def loss(rate):
        n = nest(level(linear_memory(K, K), optax.sgd(rate), 2, objective=l2_regression))
        return jnp.sum(n.apply(n.init(({"w": jnp.eye(K)},)), Tokens(x, 2 * x, x))[1] ** 2)

    # two tokens read I, two read I + rate A with A = sum_t x_t x_t^T over the first chunk
    a = x[:2].T @ x[:2]
    moved = x[2:] @ (np.eye(K) + 0.1 * a)
    assert float(jax.grad(loss)(0.1)) == pytest.approx(2 * np.sum(moved * (x[2:] @ a)), rel=1e-12)


@pytest.fixture
def tokens(x64, rng):
    """Keys, values, queries and every gate, with two masked tokens, one of them inside a chunk."""
    key, value, query = rng.normal(size=(3, T, K))
    eta, alpha, mu = rng.uniform(0.1, 0.4, T), rng.uniform(0.6, 0.95, T), rng.uniform(0.1, 0.9, T)
    return Tokens(key, value, query, eta=eta, alpha=alpha, mu=mu, mask=np.arange(T) % 7 != 2)


def _both_ways(tx, tokens, read, monkeypatch):
    """(state, reads) with the chunk form and with the rule's own update called token by token."""
    n = nest(level(MEMORY, tx, C, objective=l2_regression, read=read))
    params = float64(n.params(jax.random.key(0)))
    fast = compiled(lambda p, xs: n.apply(n.init(p), xs))(params, tokens)
    monkeypatch.setattr(hope_jax.writing, "chunk_form", lambda *_: None)
    slow = compiled(lambda p, xs: n.apply(n.init(p), xs))(params, tokens)
    return fast, slow


@pytest.mark.parametrize(
    "name, read",
    [("sgd_momentum", "after"), ("weight_decay", "start"), ("partitioned", "before"), ("lmm_gates", "before")],
)
def test_chunk_form_is_the_token_loop(name, read, tokens, monkeypatch):
    """Reads, weights, and the rule's own state: the momentum that comes out is optax' own, not the kernel's Z."""
    tx, needs = GATED.get(name) or (LINEAR[name], ())
    tokens = tokens._replace(**{g: None for g in ("eta", "alpha", "mu") if g not in needs})
    fast, slow = _both_ways(tx, tokens, read, monkeypatch)
    assert_close(fast, slow)


@pytest.mark.parametrize("options", [{"momentum": "gate"}, {"input_leaf": "w2", "decayed_erase": True}])
def test_dgd_on_a_chunk_is_dgd_token_by_token(options, tokens, monkeypatch):
    fast, slow = _both_ways(dgd(**options), tokens, "before", monkeypatch)
    assert_close(fast, slow)
