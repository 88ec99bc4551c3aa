"""Nested and independent levels of a Continuum Memory System against loops over tokens (spec 6.5)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax import cms, cms_chain, cms_memory, cms_mixture, dgd, l2_regression, level, linear_memory, nest_with_starts
from tests.oracles import (
    assert_close,
    cms_loop,
    cms_token,
    compiled,
    float64,
    independent_token,
    nested_cms_loop,
    numpy64,
)

D, F = 3, 4
SIZES = (2, 4, 12)
T = 33  # no multiple of any of them
ETA, MU = 0.1, 0.5
LOGITS = np.array([0.3, -0.5, 0.1])
OPTIONS: dict[str, Any] = {
    "nested": {"variant": "nested"},
    "outer": {"variant": "nested", "meta": "outer"},
    "independent": {"variant": "independent"},
}


def _levels(eta=ETA, mu=0.0, sizes=SIZES, **options):
    return [level(cms_memory(D, F), optax.sgd(eta / c, mu or None), c, **options) for c in sizes]


def _make(name, **options):
    return cms(*_levels(**options), loss=l2_regression.loss, **OPTIONS[name])


def _init(name, n, start, logits=LOGITS):
    return n.init(start, jnp.asarray(logits)) if name == "independent" else n.init(start)


def _token(name, weights, x, target):
    return (
        independent_token(weights, x, target, LOGITS[: len(weights)])
        if name == "independent"
        else cms_token(weights, x, target)
    )


def _weights(name, state):
    return [s.start for s in (state.levels if name == "independent" else state.levels[::2])]


def _mix(start, x, logits=LOGITS, residual=True):
    return cms_mixture([cms_memory(D, F)] * 3, start, x, jnp.asarray(logits), residual=residual)


def _loop(name, start, xs, eta=ETA, sizes=SIZES):
    """Outputs, and after every token the weights of all levels."""
    if name == "independent":
        ys, history, _ = cms_loop(
            numpy64(start), xs[0], xs[1], sizes, eta, lambda weights, x, target: _token(name, weights, x, target)
        )
        return ys, history
    ys, history = nested_cms_loop(numpy64(start), xs[0], xs[1], sizes, eta, first_order=name == "nested")
    return ys, [weights for weights, *_ in history]


@pytest.fixture
def data(x64, rng):
    return rng.normal(size=(T, D)), rng.normal(size=(T, D))


@pytest.fixture
def start(x64):
    return float64(_make("independent").params(jax.random.key(0)))


@pytest.fixture(params=OPTIONS)
def name(request):
    return request.param


def test_the_variants_are_the_token_loop(name, start, data):
    """In one call, and in calls of 3 + 10 + 20 tokens."""
    n = _make(name)
    ys, history = _loop(name, start, data)
    state, y = compiled(lambda p, xs: n.apply(_init(name, n, p), xs))(start, data)
    assert_close(y, ys)
    assert_close(_weights(name, state), history[-1])
    split, parts, now = _init(name, n, start), [], 0
    for length in (3, 10, 20):
        piece = [d[now : now + length] for d in data]
        split, y = compiled(n.apply, static_argnames="phase")(split, piece, phase=now)
        parts.append(y)
        now += length
    assert_close(jnp.concatenate(parts), ys)
    assert_close(split, state)


def test_start_states_and_rules_with_a_memory(start, data):
    """Start states, all pending sums, and momentum: of a level that starts again gone, of a start state kept."""
    n = _make("nested", mu=MU)
    ys, history = nested_cms_loop(numpy64(start), data[0], data[1], SIZES, ETA, mu=MU)
    state, y = compiled(lambda p, xs: n.apply(n.init(p), xs))(start, data)
    weights, starts, pending, start_pending = history[-1]
    assert_close(y, ys)
    assert_close([s.start for s in state.levels[::2]], weights)
    assert_close([s.start for s in state.levels[1::2]], starts)
    assert_close([s.pending for s in state.levels[::2]], pending)
    assert_close([s.pending for s in state.levels[1::2]], start_pending)


def test_the_path_that_does_not_know_its_clock(name, start, data):
    """Token by token with a traced state: outputs and weights of the loop after every token."""
    n = _make(name)
    step = jax.jit(n.apply)
    state, (ys, history) = _init(name, n, start), _loop(name, start, data)
    for t in range(T):
        state, y = step(state, [d[t : t + 1] for d in data])
        assert_close(y[0], ys[t])
        assert_close(_weights(name, state), history[t])


@pytest.mark.parametrize("name", ["nested", "outer"], indirect=True)
def test_levels_start_again_when_the_next_slower_one_writes(name, start, data):
    """Right after a write of level l + 1 level l is its start state, bit for bit, until its own next write: that is
    floor(T / C) resets. Exactly, operation by operation (compiled, the two may be rounded apart)."""
    n = _make(name)
    state, resets = n.init(start), [0, 0]
    for t in range(T):
        state, _ = n.apply(state, [d[t : t + 1] for d in data])
        for i, slower in enumerate(SIZES[1:]):
            fast, origin = state.levels[2 * i].start, state.levels[2 * i + 1].start
            same = all((fast[k] == origin[k]).all() for k in fast)
            assert same == ((t + 1) % slower < SIZES[i])
            resets[i] += (t + 1) % slower == 0
            if name == "outer" or t + 1 < slower:
                assert_close(origin, start[i], 0)
            else:
                assert all((origin[k] != start[i][k]).any() for k in origin)
    assert resets == [T // c for c in SIZES[1:]]


def test_a_level_that_writes_every_token_starts_again_too(start, data):
    """`dgd` keeps running weights: they start again as well, on both paths."""
    n = cms(level(cms_memory(D, F), dgd(0.2), 2), _levels()[1], loss=l2_regression.loss, variant="nested")
    state, y = n.apply(n.init(start[:2]), [d[:8] for d in data])
    fast, origin, _ = state.levels
    assert_close(fast.running, origin.start)
    assert float(jnp.abs(origin.start["w1"] - start[0]["w1"]).max()) > 1e-4
    other, parts = n.init(start[:2]), []
    step = jax.jit(n.apply)
    for t in range(8):
        other, part = step(other, [d[t : t + 1] for d in data])
        parts.append(part)
    assert_close((other, jnp.concatenate(parts)), (state, y))


def test_without_learning_they_are_plain_functions(name, start, data):
    n = _make(name, eta=0.0)
    state, y = n.apply(_init(name, n, start), data)
    memories = [cms_memory(D, F)] * 3
    plain = _mix(start, data[0]) if name == "independent" else cms_chain(memories, start, data[0])
    assert_close(y, plain)
    assert_close(plain, np.stack([_token(name, numpy64(start), a, b)[0] for a, b in zip(*data, strict=True)]))
    assert_close(_weights(name, state), list(start), 0)


def test_causality(name, start, data):
    """The token at t0 and its target change nothing before t0, and the target at t0 changes the output at t0 + 1."""
    n, (x, target), t0 = _make(name), data, 9  # the last token of a chunk of the fastest level alone
    run = jax.jit(lambda xs: n.apply(_init(name, n, start), xs)[1])
    y = run((x, target))
    later = np.arange(T)[:, None] >= t0
    changed = run((np.where(later, x + 1, x), np.where(later, target - 1, target)))
    assert_close(changed[:t0], y[:t0], 0)
    taught = run((x, np.where(np.arange(T)[:, None] == t0, target + 1, target)))
    assert_close(taught[: t0 + 1], y[: t0 + 1], 0)
    assert float(jnp.abs(taught[t0 + 1] - y[t0 + 1]).max()) > 1e-6


TWO, SHORT = SIZES[:2], 10  # two levels for outer gradients, which take longest to compile


def _outer(name, data, **options):
    """The outer loss as a function of the start weights and logits of two levels."""
    n, xs = _make(name, eta=0.3, sizes=TWO, **options), [d[:SHORT] for d in data]

    def loss(start, logits):
        _, y = n.apply(_init(name, n, start, logits), xs)
        return jnp.mean(l2_regression.loss(y, xs[1]))

    return loss


def test_the_outer_gradient_is_the_finite_difference(name, start, data):
    loss, at = _outer(name, data), (start[:2], LOGITS[:2])
    value = compiled(loss)
    gradients = compiled(jax.grad(loss, argnums=(0, 1)))(*at)
    draws = np.random.default_rng(0)
    direction = jax.tree.map(lambda leaf: draws.normal(size=np.shape(leaf)), at)
    moved = [value(*jax.tree.map(lambda w, d, s=s: w + s * 1e-5 * d, at, direction)) for s in (1, -1)]
    along = sum(jnp.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (gradients, direction)), strict=True))
    assert float(along) == pytest.approx(float(moved[0] - moved[1]) / 2e-5, rel=1e-6)
    assert (np.abs(gradients[1]) > 0).all() == (name == "independent")


@pytest.mark.slow
def test_truncated_outer_gradients(name, start, data):
    """bptt_chunks longer than the sequence is the full gradient exactly; 1 is first order: every weight moves as if
    it were the start weight, restarts and the writes of start states included (spec 6.6)."""
    at = start[:2], LOGITS[:2]

    def gradient(bptt_chunks):
        return compiled(jax.grad(_outer(name, data, bptt_chunks=bptt_chunks)))(*at)

    full = gradient(None)
    assert_close(gradient(100), full, 0)
    xs = [d[:SHORT] for d in data]
    _, history = _loop(name, at[0], xs, eta=0.3, sizes=TWO)
    first = jax.tree.map(np.zeros_like, numpy64(at[0]))
    for t in range(SHORT):
        weights = numpy64(at[0]) if t == 0 else history[t - 1]
        _, g = _token(name, weights, xs[0][t], xs[1][t])
        first = jax.tree.map(lambda a, b: a + b / SHORT, first, tuple(g))
    assert_close(gradient(1), first)
    assert float(jnp.abs(full[0]["w1"] - first[0]["w1"]).max()) > 1e-4  # the writes do matter here


def test_independent_levels_mix_by_their_logits(start, data):
    """Equal logits give the mean of the levels; levels permuted with their logits and clocks give the same output."""
    memory, x = cms_memory(D, F), data[0]
    alone = [cms_chain([memory], [p], x) for p in start]
    assert_close(_mix(start, x, np.full(3, 0.7)), sum(alone) / 3)
    order = [2, 0, 1]
    permuted = _mix([start[i] for i in order], x, LOGITS[order])
    assert_close(permuted, _mix(start, x))
    bare = _mix(start, x, residual=False)
    assert_close(x + bare, _mix(start, x))
    still = _make("independent", eta=0.0)
    assert_close(still.apply(still.init(start), data)[1], sum(alone) / 3)  # logits are zero at the start


def test_what_cannot_be_meant_is_refused(start):
    levels = _levels()
    with pytest.raises(ValueError, match="variant must be one of sequential, nested, independent; got 'parallel'"):
        cms(*levels, loss=l2_regression.loss, variant="parallel")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="meta must be one of first_order, outer; got 'second_order'"):
        cms(*levels, loss=l2_regression.loss, variant="nested", meta="second_order")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"one logit each, shape \(3,\); got \(2,\)"):
        _make("independent").init(start, jnp.zeros(2))
    with pytest.raises(ValueError, match="init takes one tree of weights per level, a tuple of 3"):
        _make("nested").init(start[:2])
    with pytest.raises(ValueError, match=r"chunk sizes must divide, fastest first; got \[2, 3\]"):
        rules = [level(linear_memory(D, D), optax.sgd(0.1), c) for c in (2, 3)]
        nest_with_starts(*rules, error=lambda *_: None)
    with pytest.raises(ValueError, match="fastest level has restarts=True"):
        cms(level(cms_memory(D, F), optax.sgd(0.1), 2, restarts=True), loss=l2_regression.loss)
