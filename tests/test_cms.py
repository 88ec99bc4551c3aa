"""The Continuum Memory System: who changes when, by how much, and what the outer level sees (spec section 6)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax import cms, cms_chain, cms_memory, dgd, l2_regression, level, linear_memory, slow_period
from tests.oracles import (
    assert_close,
    cms_factors,
    cms_loop,
    cms_token,
    compiled,
    float64,
    gelu,
    numpy64,
    proximal,
    write,
)

D, F = 3, 4
SIZES = (2, 4, 12)
T = 33  # no multiple of any of them
ETA = 0.1  # small enough that all three levels together stay stable, and numbers of order one


def _levels(sizes=SIZES, eta=ETA, **options):
    return [level(cms_memory(D, F), optax.sgd(eta / c), c, **options) for c in sizes]


@pytest.fixture
def data(x64, rng):
    return rng.normal(size=(T, D)), rng.normal(size=(T, D))


@pytest.fixture
def start(x64):
    return float64(cms(*_levels(), loss=l2_regression.loss).params(jax.random.key(0)))


@pytest.fixture
def chain(x64):
    return cms(*_levels(), loss=l2_regression.loss)


def test_three_levels_are_the_token_loop(chain, start, data):
    """In one call, and in calls of 3 + 10 + 20 tokens; weights, pending errors, phase and outputs."""
    ys, history, pending = cms_loop(numpy64(start), data[0], data[1], SIZES, ETA)
    state, y = compiled(lambda p, xs: chain.apply(chain.init(p), xs))(start, data)
    assert_close(y, ys)
    assert_close([s.start for s in state.levels], history[-1])
    assert_close([s.pending for s in state.levels], pending)
    assert int(state.phase) == T % SIZES[-1]
    split, parts, now = chain.init(start), [], 0
    for n in (3, 10, 20):
        split, y = compiled(chain.apply, static_argnames="phase")(split, [d[now : now + n] for d in data], phase=now)
        parts.append(y)
        now += n
    assert_close(jnp.concatenate(parts), ys)
    assert_close(split, state)


def test_levels_change_only_at_their_boundaries(chain, start, data):
    """Token by token: bit for bit the same weights inside a chunk, and at its end minus eta times the sum of the
    per-token gradients at the weights of the chunk's start."""
    step = jax.jit(chain.apply)  # the state is traced, so this is also the path that does not know its clock
    state, seen = chain.init(start), []
    for t in range(T):
        state, _ = step(state, [d[t : t + 1] for d in data])
        seen.append(numpy64([s.start for s in state.levels]))
    before = numpy64(list(start))
    sums = [jax.tree.map(np.zeros_like, p) for p in before]
    for t in range(T):
        _, gradients = cms_token(before if t == 0 else seen[t - 1], data[0][t], data[1][t])
        for i, c in enumerate(SIZES):
            sums[i] = jax.tree.map(np.add, sums[i], gradients[i])
            old, new = before[i] if t < c else seen[t - 1][i], seen[t][i]
            if (t + 1) % c:
                assert_close(new, numpy64(start[i]) if t < c else seen[t - 1][i], 0)
                assert_close(new, old, 0)
            else:
                assert all((new[n] != old[n]).any() for n in new)
                assert_close(new, jax.tree.map(lambda w, g, c=c: w - ETA / c * g, old, sums[i]))
                sums[i] = jax.tree.map(np.zeros_like, sums[i])


def test_without_learning_it_is_the_plain_chain(x64, start, data):
    """eta = 0: the chain of MLPs, pre-normed and residual (S6.1), whatever the clocks; exactly, where both run
    operation by operation (a compiled scan may fuse and round differently)."""
    still = cms(*_levels(eta=0.0), loss=l2_regression.loss)
    x, target = (d[:24] for d in data)
    state, y = still.apply(still.init(start), (x, target))
    plain = cms_chain([cms_memory(D, F)] * 3, start, x)
    assert_close(y, plain)
    assert_close(plain, np.stack([cms_token(numpy64(start), a, b)[0] for a, b in zip(x, target, strict=True)]))
    assert_close([s.start for s in state.levels], list(start), 0)
    whole = cms(*_levels((50, 100, 100), eta=0.0), loss=l2_regression.loss)
    assert_close(whole.apply(whole.init(start), (x, target))[1], plain, 0)


def test_the_bare_chain_of_the_paper(x64, start, data):
    """(70): residual=False, norm=False."""
    bare = cms(*_levels(eta=0.0), loss=l2_regression.loss, residual=False, norm=False)
    x, target = (d[:12] for d in data)
    _, y = bare.apply(bare.init(start), (x, target))
    for p in numpy64(start):
        x = gelu(x @ p["w2"]) @ p["w1"]
    assert_close(y, x)


def test_causality(chain, start, data):
    """The token at t0 and its target change nothing before t0, and the target at t0 changes the output at t0 + 1."""
    x, target = data
    run = jax.jit(lambda xs: chain.apply(chain.init(start), xs)[1])
    y, t0 = run((x, target)), 7  # the last token of a chunk of the two fastest levels
    later = np.arange(T)[:, None] >= t0
    changed = run((np.where(later, x + 1, x), np.where(later, target - 1, target)))
    assert_close(changed[:t0], y[:t0], 0)
    taught = run((x, np.where(np.arange(T)[:, None] == t0, target + 1, target)))
    assert_close(taught[: t0 + 1], y[: t0 + 1], 0)
    assert float(jnp.abs(taught[t0 + 1] - y[t0 + 1]).max()) > 1e-6


def test_delta_gradient_descent_writes_every_token(start, data):
    """A level whose rule needs the product over its chunk: errors at the start weights, the recurrence on running
    ones, which take over at the boundary (spec 6.2). Beside it a level that sums; T is no multiple of either."""
    x, target = (d[:11] for d in data)
    levels = [level(cms_memory(D, F), dgd(0.2), 2), *_levels((4,))]
    chain = cms(*levels, loss=l2_regression.loss)
    state, y = compiled(lambda p, xs: chain.apply(chain.init(p), xs))(start[:2], (x, target))
    fast, slow = numpy64(start[:2])
    running, pending, ys = fast, {n: 0.0 for n in slow}, []
    for t in range(11):
        out, (factors, gradients) = cms_factors([fast, slow], x[t], target[t])
        ys.append(out)
        steps = {n: proximal(0.2, k) for n, (k, _) in factors.items()}
        running = {n: write(running[n], 0.0, k, -steps[n] * d, steps[n])[0] for n, (k, d) in factors.items()}
        pending = {n: pending[n] + np.outer(*gradients[n]) for n in slow}
        if (t + 1) % 2 == 0:
            fast = running
        if (t + 1) % 4 == 0:
            slow = {n: slow[n] - ETA / 4 * pending[n] for n in slow}
            pending = {n: 0.0 for n in slow}
    assert_close(y, np.stack(ys))
    assert_close([s.start for s in state.levels], [fast, slow])
    assert_close(state.levels[0].running, running)
    assert_close(state.levels[1].pending, pending)


def _outer(chain, data):
    """The outer loss as a function of the start weights: the mean loss of what was answered along the way."""
    x, target = (d[:12] for d in data)

    def loss(start):
        _, y = chain.apply(chain.init(start), (x, target))
        return jnp.mean(l2_regression.loss(y, target))

    return loss


def test_the_outer_gradient_is_the_finite_difference(start, data):
    loss = _outer(cms(*_levels(eta=0.3), loss=l2_regression.loss), data)
    value = compiled(loss)
    gradients = compiled(jax.grad(loss))(start)
    for i, name in ((0, "w1"), (1, "w2"), (2, "w1")):
        direction = np.random.default_rng(i).normal(size=start[i][name].shape)
        moved = [
            tuple({**p, name: p[name] + s * 1e-5 * direction} if j == i else p for j, p in enumerate(start))
            for s in (1, -1)
        ]
        want = float(value(moved[0]) - value(moved[1])) / 2e-5
        assert float(jnp.sum(gradients[i][name] * direction)) == pytest.approx(want, rel=1e-6)


def test_truncated_outer_gradients(start, data):
    """bptt_chunks longer than the sequence is the full gradient exactly; 1 is first order: the gradient with the
    writes taken as constants (spec 6.6)."""

    def gradient(bptt_chunks):
        levels = _levels((3,), eta=0.3, bptt_chunks=bptt_chunks)
        return compiled(jax.grad(_outer(cms(*levels, loss=l2_regression.loss), data)))(start[:1])

    full = gradient(None)
    assert_close(gradient(100), full, 0)
    x, target = (d[:12] for d in data)
    _, history, _ = cms_loop(numpy64(start[:1]), x, target, (3,), 0.3)
    first = jax.tree.map(np.zeros_like, numpy64(start[:1]))
    for t in range(12):  # the gradient at the weights of the moment, as if these were the start weights
        weights = numpy64(start[:1]) if t < 3 else history[t // 3 * 3 - 1]
        _, g = cms_token(weights, x[t], target[t])
        first = jax.tree.map(lambda a, b: a + b / 12, first, tuple(g))
    assert_close(gradient(1), first)
    assert float(jnp.abs(full[0]["w1"] - first[0]["w1"]).max()) > 1e-4  # the writes do matter here
    two = gradient(2)
    assert_close(two, _truncated(start[:1], x, target, 2))
    assert float(jnp.abs(two[0]["w1"] - first[0]["w1"]).max()) > 1e-4
    assert float(jnp.abs(two[0]["w1"] - full[0]["w1"]).max()) > 1e-4


def _truncated(start, x, target, every):
    """The outer gradient with theta <- theta_0 + sg(theta - theta_0) after every so many writes, as a plain loop."""
    memory = cms_memory(D, F)

    def losses(params, a, b):
        return jnp.sum(l2_regression.loss(cms_chain([memory], params, a), b))

    def total(params):
        weights, out = params, 0.0
        for i in range(4):
            chunk = x[3 * i : 3 * i + 3], target[3 * i : 3 * i + 3]
            out = out + losses(weights, *chunk) / 12
            weights = jax.tree.map(lambda w, g: w - 0.3 / 3 * g, weights, jax.grad(losses)(weights, *chunk))
            if (i + 1) % every == 0:
                weights = jax.tree.map(lambda w, w0: w0 + jax.lax.stop_gradient(w - w0), weights, params)
        return out

    return compiled(jax.grad(total))(start)


def test_it_learns(start, data):
    """The chain follows a fixed map better at the end of the stream than at its beginning."""
    x = np.random.default_rng(1).normal(size=(600, D))
    target = x @ np.random.default_rng(2).normal(size=(D, D)) / 2
    chain = cms(*_levels(eta=0.1), loss=l2_regression.loss)
    _, y = chain.apply(chain.init(start), (x, target))
    losses = np.asarray(l2_regression.loss(y, jnp.asarray(target)))
    assert losses[-100:].mean() < 0.5 * losses[:100].mean()


def test_slow_period():
    """Test 30: inside the sequence, or every p steps; in between no step ends where the chunk does."""
    assert slow_period(16, 512, 4096) is None
    assert slow_period(512, 512, 4096) is None
    assert slow_period(4096, 512, 4096) == 1
    assert slow_period(12288, 512, 4096) == 3
    for chunk, length, tau in ((1024, 512, 4096), (6000, 512, 4096)):
        with pytest.raises(ValueError, match=f"C={chunk}.*T={length}.*tau={tau}"):
            slow_period(chunk, length, tau)


@pytest.mark.parametrize(
    "lev",
    [
        level(None, optax.sgd(0.1), 2),
        level(linear_memory(D, D), optax.sgd(0.1), 2, objective=l2_regression),
    ],
)
def test_a_level_without_memory_or_with_its_own_objective_is_refused(lev):
    with pytest.raises(ValueError, match="memory and no objective"):
        cms(lev, loss=l2_regression.loss)
