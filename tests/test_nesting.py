"""The nest: levels in time are the token loop, however a call is cut, traced, batched or differentiated."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax import (
    Outer,
    Tokens,
    Write,
    dgd,
    heavy_ball,
    huber,
    l2_regression,
    level,
    linear_memory,
    mlp_memory,
    nest,
    retention,
)
from tests.oracles import (
    assert_close,
    compiled,
    float64,
    mlp_factors,
    mlp_read,
    numpy64,
    primitives,
    proximal,
    write,
)

K, F = 3, 4


# --- the definition -------------------------------------------------------------------------------------------------


def dgd_rule(gates):
    """`dgd(momentum="gate")` on one memory: a function (t, weights, error at the output's factors) -> weights."""
    z = {}

    def step(t, params, factors):
        new = {}
        for name, (key, delta) in factors.items():
            eta = proximal(gates["eta"][t], key)
            old = z.get(name, np.zeros_like(params[name]))
            new[name], z[name] = write(
                params[name], old, key, -eta * delta, eta, gates["alpha"][t], gates["mu"][t]
            )  # fmt: skip
        return new

    return step


def optax_rule(tx, start):
    """Any optax transformation, called once per token with the dense gradient."""
    state = tx.init(float64(start))
    update = compiled(tx.update)

    def step(t, params, factors):
        nonlocal state
        updates, state = update({n: np.outer(k, d) for n, (k, d) in factors.items()}, state, params)
        return {n: params[n] + np.asarray(updates[n]) for n in params}

    return step


def local_level(start, rule, size, tokens, read="start", delta=lambda y, v: y - v):
    """One local level, token by token: errors at the chunk's start weights, writes into the running ones."""
    running, ys = dict(start), []
    for t in range(len(tokens.key)):
        before = running
        y = mlp_read(start, tokens.key[t])
        if tokens.mask is None or tokens.mask[t]:
            running = rule(t, running, mlp_factors(start, tokens.key[t], delta(y, tokens.value[t])))
        ys.append(mlp_read({"start": start, "before": before, "after": running}[read], tokens.query[t]))
        if (t + 1) % size == 0:
            start = running
    return np.stack(ys), start, running


def make_tokens(rng, length, gates=("eta", "alpha", "mu")):
    key, value, query = rng.normal(size=(3, length, K)) * 0.7
    ranges = {"eta": (0.1, 0.6), "alpha": (0.7, 1.0), "mu": (0.1, 0.8)}
    return Tokens(key, value, query, **{g: rng.uniform(*ranges[g], length) for g in gates})


def gates_of(tokens):
    return {"eta": tokens.eta, "alpha": tokens.alpha, "mu": tokens.mu}


def take(xs, a, b):
    return jax.tree.map(lambda x: x[a:b], xs)


def from_scratch(n, params, xs):
    return compiled(lambda p, xs: n.apply(n.init(p), xs))(params, xs)


# --- the nest is the token loop ----------------------------------------------------------------------------------


def test_three_local_levels_are_the_token_loop(x64, rng):
    """Three memories, clocks, reads, rules (kernel, linear, stepped token by token) and a masked token, T = 13."""
    tokens = make_tokens(rng, 13)._replace(mask=np.arange(13) != 5)
    adam = optax.adam(0.1)
    n = nest(
        level(mlp_memory(K, F), dgd(momentum="gate"), 2, objective=l2_regression, read="before"),
        level(linear_memory(K, K, 1.0), optax.sgd(0.1, 0.9), 4, objective=huber(0.5), read="after"),
        level(linear_memory(K, K, 1.0), adam, 8, objective=l2_regression),
    )
    params = float64(n.params(jax.random.key(0)))
    start = numpy64(params)
    state, ys = from_scratch(n, params, tokens)
    clip = lambda y, v: np.clip(y - v, -0.5, 0.5)  # noqa: E731
    wants = [
        local_level(start[0], dgd_rule(gates_of(tokens)), 2, tokens, "before"),
        local_level(start[1], optax_rule(optax.sgd(0.1, 0.9), start[1]), 4, tokens, "after", clip),
        local_level(start[2], optax_rule(adam, start[2]), 8, tokens),
    ]
    for lev, y, (want_y, want_start, want_running) in zip(state.levels, ys, wants, strict=True):
        assert_close(y, want_y)
        assert_close(lev.start, want_start)
        assert_close(lev.running, want_running)
    assert int(state.phase) == 5


def test_any_optax_rule_is_stepped_exactly(x64, rng):
    """Adaptive, clipped, scheduled, sign and matrix rules: each as optax itself would step it on every token."""
    rules = [
        optax.adam(0.1),
        optax.rmsprop(0.1),
        optax.sgd(optax.linear_schedule(0.1, 0.0, 5), 0.9, nesterov=True),
        optax.chain(optax.clip_by_global_norm(0.3), optax.lion(0.1)),
        optax.contrib.muon(0.1),
        optax.chain(optax.sgd(0.1), retention(0.9, "start")),
    ]
    n = nest(*(level(linear_memory(K, K, 1.0), tx, 3, objective=l2_regression, read="after") for tx in rules))
    params = float64(n.params(jax.random.key(0)))
    tokens = make_tokens(rng, 6, ())
    state, ys = from_scratch(n, params, tokens)
    for tx, start, lev, y in zip(rules, numpy64(params), state.levels, ys, strict=True):
        want_y, want_start, _ = local_level(start, optax_rule(tx, start), 3, tokens, "after")
        assert_close(y, want_y)
        assert_close(lev.start, want_start)


def _mixed(factor=True):
    """A local level under a global one: y = M(x) + (x a) b, the slow weights a, b learn the error of the sum.

    The errors of `a` are dense, those of `b` dense or factored."""
    fast = level(linear_memory(K, K, 1.0), dgd(0.4), 2, objective=l2_regression)

    def error(params, carry, xs):
        x, target = xs
        w, p = params[0]["w"], params[1]
        h = x @ p["a"]
        y = x @ w + h @ p["b"]
        e = y - target
        for_b = Outer(e, h)
        slow_errors = {"a": x.T @ (e @ p["b"].T), "b": for_b if factor else h.T @ e}
        return ({"w": Outer(x @ w - target, x)}, slow_errors), carry + jnp.sum(x), y

    return nest(fast, level(None, optax.sgd(0.05, 0.9), 4), error=error)


def _mixed_start():
    rng = np.random.default_rng(5)
    return {"w": rng.normal(size=(K, K))}, {"a": rng.normal(size=(K, F)) / 2, "b": rng.normal(size=(F, K)) / 2}


@pytest.mark.parametrize("factor", [True, False])
def test_local_and_global_levels_with_an_error_function(factor, x64, rng):
    """The local level writes every token, the global one sums its chunk and steps its momentum once; 4 does not
    divide 11 and the rest stays pending. What the error function carries goes from piece to piece."""
    x, target = rng.normal(size=(2, 11, K)) * 0.7
    start = _mixed_start()
    n = _mixed(factor=factor)
    state, y = compiled(lambda p, c, xs: n.apply(n.init(p, c), xs))(float64(start), jnp.zeros(()), (x, target))
    w, running, p = start[0]["w"], start[0]["w"], dict(start[1])
    pending, trace, ys = {"a": 0, "b": 0}, {"a": 0, "b": 0}, []
    for t in range(11):
        h = x[t] @ p["a"]
        ys.append(x[t] @ w + h @ p["b"])
        e = ys[-1] - target[t]
        pending = {"a": pending["a"] + np.outer(x[t], e @ p["b"].T), "b": pending["b"] + np.outer(h, e)}
        eta = proximal(0.4, x[t])
        running, _ = write(running, 0, x[t], -eta * (x[t] @ w - target[t]), eta)
        if (t + 1) % 2 == 0:
            w = running
        if (t + 1) % 4 == 0:
            trace = {i: 0.9 * trace[i] + pending[i] for i in p}
            p = {i: p[i] - 0.05 * trace[i] for i in p}
            pending = {"a": 0, "b": 0}
    assert_close(y, np.stack(ys))
    assert_close(state.levels[0].start["w"], w)
    assert_close(state.levels[0].running["w"], running)
    assert_close(state.levels[1].start, p)
    assert_close(state.levels[1].pending, pending)
    assert_close(state.carry, x.sum())
    assert int(state.phase) == 3


def test_factored_errors_of_a_slow_level_are_the_dense_ones(x64, rng):
    """A global level takes `Outer` leaves too, over three clocks and at the ends of a call."""
    memory = mlp_memory(K, F)

    def build(dense):
        def error(params, carry, xs):
            errors, y = [], 0.0
            for p in params:
                gradient = jax.grad(lambda p: jnp.sum(memory.apply(p, xs) ** 2) / 2)(p)
                taps = {"w1": Outer(memory.apply(p, xs), jax.nn.gelu(xs @ p["w2"]))}
                slope = jax.vmap(jax.vmap(jax.grad(jax.nn.gelu)))(xs @ p["w2"])
                taps["w2"] = Outer(slope * (taps["w1"].delta @ p["w1"].T), xs)
                errors.append(gradient if dense else taps)
                y = y + memory.apply(p, xs)
            return tuple(errors), carry, y

        return nest(*(level(memory, optax.sgd(0.1), c) for c in (1, 3, 6)), error=error)

    x = rng.normal(size=(11, K))
    params = float64(build(True).params(jax.random.key(0)))
    assert_close(from_scratch(build(True), params, x), from_scratch(build(False), params, x))


# --- the clock ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_levels():
    """A local level with gates and momentum under another one stepped by adam, clocks 2 and 6."""
    return nest(
        level(linear_memory(K, K, 1.0), dgd(momentum="gate"), 2, objective=l2_regression, read="before"),
        level(linear_memory(K, K, 1.0), optax.adam(0.05), 6, objective=l2_regression),
    )


@pytest.fixture
def whole(two_levels, x64, rng):
    """(start weights, tokens, state and reads of one call), T = 14."""
    params, tokens = float64(two_levels.params(jax.random.key(0))), make_tokens(rng, 14)
    return params, tokens, *from_scratch(two_levels, params, tokens)


@pytest.mark.parametrize("cuts", [(1, 9), (5, 12)])
def test_a_call_may_be_cut_anywhere(cuts, two_levels, whole):
    params, tokens, want, want_y = whole
    state, parts, now = two_levels.init(params), [], 0
    for stop in (*cuts, 14):
        state, y = compiled(two_levels.apply, static_argnames="phase")(state, take(tokens, now, stop), phase=now)
        parts.append(y)
        now = stop
    assert_close(state, want)
    assert_close(jax.tree.map(lambda *y: jnp.concatenate(y), *parts), want_y)


def test_whole_chunks_in_two_calls_are_one_call_bit_for_bit(two_levels, x64, rng):
    """2 T in one program or T twice: the same tokens in the same chunks, the same numbers."""
    params, tokens = float64(two_levels.params(jax.random.key(0))), make_tokens(rng, 24)
    apply = compiled(two_levels.apply, static_argnames="phase")
    once, y = apply(two_levels.init(params), tokens, phase=0)
    twice, first = apply(two_levels.init(params), take(tokens, 0, 12), phase=0)
    twice, second = apply(twice, take(tokens, 12, 24), phase=0)
    assert_close(twice, once, 0)
    assert_close(jax.tree.map(lambda *y: jnp.concatenate(y), first, second), y, 0)


def test_an_unknown_phase_is_the_known_one(two_levels, whole):
    """A state that is traced: the clock is in the state, boundaries by selection."""
    params, tokens, want, want_y = whole
    apply = compiled(two_levels.apply)
    state, first = apply(two_levels.init(params), take(tokens, 0, 7))
    state, second = apply(state, take(tokens, 7, 14))
    assert_close(state, want)
    assert_close(jax.tree.map(lambda *y: jnp.concatenate(y), first, second), want_y)


def test_the_phase_of_a_concrete_state_is_read(x64, rng):
    """Outside jit nothing needs to be said: the same numbers without `phase`, and no token loop."""
    n, tokens = _one(dgd(0.3), 4), make_tokens(rng, 7, ())
    params = float64(n.params(jax.random.key(0)))
    want, _ = from_scratch(n, params, tokens)
    state, _ = n.apply(n.init(params), take(tokens, 0, 3))
    assert int(state.phase) == 3
    assert "scan" not in primitives(jax.make_jaxpr(lambda: n.apply(state, take(tokens, 3, 4)))().jaxpr)
    state, _ = n.apply(state, take(tokens, 3, 7))
    assert_close(state, want)


def test_no_tokens(two_levels, whole):
    _, tokens, state, _ = whole
    for phase in (None, 2):
        same, ys = two_levels.apply(state, take(tokens, 0, 0), phase=phase)
        assert_close(same, state, 0)
        assert [y.shape for y in ys] == [(0, K), (0, K)]


def test_a_masked_token_is_not_there(x64, rng):
    """At C = 1 a masked token is as good as absent, for a rule with a kernel and for one without: weights, momenta,
    counts and the other tokens' reads. Its clock ticks (spec 6.2)."""
    keep = np.array([1, 1, 0, 1, 0, 0, 1, 1], bool)
    n = nest(
        level(linear_memory(K, K, 1.0), dgd(momentum="gate"), 1, objective=l2_regression),
        level(mlp_memory(K, F), optax.chain(optax.sgd(0.1), heavy_ball(), retention()), 1, objective=l2_regression),
        level(linear_memory(K, K, 1.0), optax.adam(0.1), 1, objective=l2_regression),
    )
    params, tokens = float64(n.params(jax.random.key(0))), make_tokens(rng, 8)
    masked, y = from_scratch(n, params, tokens._replace(mask=keep))
    absent, y_absent = from_scratch(n, params, jax.tree.map(lambda x: x[keep], tokens))
    assert_close(masked.levels, absent.levels)
    assert_close(jax.tree.map(lambda y: y[keep], y), y_absent)


# --- outer gradients ------------------------------------------------------------------------------------------------


def _loss(n, tokens):
    def loss(params):
        _, ys = n.apply(n.init(params), tokens)
        return sum(jnp.sum(y**2) for y in jax.tree.leaves(ys))

    return loss


def _one(tx, size=2, memory=None, **options):
    memory = memory if memory is not None else linear_memory(K, K, 1.0)
    return nest(level(memory, tx, size, objective=l2_regression, **options.pop("level", {})), **options)


def test_bptt_chunks_of_a_local_level(x64, rng):
    """Longer than the sequence: the full gradient, exactly. 1: first order, here sum_t q_t^T (2 y_t)."""
    tokens = make_tokens(rng, 8, ("eta", "alpha"))
    params = float64(_one(dgd()).params(jax.random.key(0)))

    def gradient(bptt_chunks):
        n = _one(dgd(), level={"bptt_chunks": bptt_chunks})
        return compiled(jax.grad(_loss(n, tokens)))(params)[0]["w"]

    full = gradient(None)
    assert_close(gradient(100), full, 0)
    _, y = from_scratch(_one(dgd()), params, tokens)
    first = np.asarray(tokens.query).T @ (2 * np.asarray(y))
    assert_close(gradient(1), first)
    assert float(jnp.abs(full - first).max()) > 1e-3


@pytest.mark.parametrize("every", [1, 2])
def test_truncation_cuts_weights_and_momentum(every, x64, rng):
    """After every so many writes the running weights keep only their first-order path to the start, and the momentum
    none: the gradient of the same recurrence written as a plain loop."""
    tokens = make_tokens(rng, 8)
    n = _one(dgd(momentum="gate"), level={"bptt_chunks": every, "read": "before"})
    params = float64(n.params(jax.random.key(0)))
    k, v, q, eta, alpha, mu = (jnp.asarray(x) for x in tokens[:6])

    def loss(first):
        start, s, z, total = first, first, jnp.zeros_like(first), 0.0
        for t in range(8):
            total = total + jnp.sum((q[t] @ s) ** 2)
            step = eta[t] / (1 + eta[t] * k[t] @ k[t])
            z = mu[t] * z - step * jnp.outer(k[t], k[t] @ start - v[t])
            s = alpha[t] * s - step * jnp.outer(k[t], k[t] @ s) + z
            if (t + 1) % (2 * every) == 0:
                s, z = first + jax.lax.stop_gradient(s - first), jax.lax.stop_gradient(z)
            start = s if (t + 1) % 2 == 0 else start
        return total

    want = compiled(jax.grad(loss))(params[0]["w"])
    assert_close(compiled(jax.grad(_loss(n, tokens)))(params)[0]["w"], want)


def test_remat_changes_no_number(x64, rng):
    """Values exactly, gradients as far as a reordered sum may; and only with remat is there something recomputed."""
    tokens = make_tokens(rng, 8, ())
    plain, saved = (_one(dgd(0.3), memory=mlp_memory(K, F), remat=r) for r in (False, True))
    params = float64(plain.params(jax.random.key(0)))
    a = compiled(jax.value_and_grad(_loss(plain, tokens)))(params)
    b = compiled(jax.value_and_grad(_loss(saved, tokens)))(params)
    assert_close(a, b)
    assert "remat2" in primitives(jax.make_jaxpr(_loss(saved, tokens))(params).jaxpr)
    assert "remat2" not in primitives(jax.make_jaxpr(_loss(plain, tokens))(params).jaxpr)


def test_no_conditionals(two_levels, rng):
    """Neither with a known clock nor with an unknown one, forward and backward; whole chunks are scans."""
    tokens = jax.tree.map(lambda x: x.astype(np.float32), make_tokens(rng, 14))
    state = two_levels.init(two_levels.params(jax.random.key(0)))
    known = primitives(jax.make_jaxpr(lambda s, xs: two_levels.apply(s, xs, phase=0))(state, tokens).jaxpr)
    unknown = primitives(jax.make_jaxpr(two_levels.apply)(state, tokens).jaxpr)
    backward = primitives(
        jax.make_jaxpr(jax.grad(_loss(two_levels, tokens)))(two_levels.params(jax.random.key(0))).jaxpr
    )
    assert "scan" in known & unknown & backward
    assert not {"cond", "while"} & (known | unknown | backward)


RULES_AT_ZERO = {
    "sgd": optax.sgd(0.1),
    "dgd_momentum": dgd(0.1, momentum=0.9),
    "lmm": optax.chain(optax.sgd(0.1), heavy_ball(0.9), retention(0.9)),
    "adam": optax.adam(0.1, eps_root=1e-8),
    "lion": optax.lion(0.1),
}


def test_outer_gradients_are_finite_at_zero_inner_gradient(x64):
    """Spec test 46: empty memories are asked to remember zero, so every error is exactly zero."""
    n = nest(*(level(linear_memory(K, K), tx, 2, objective=l2_regression) for tx in RULES_AT_ZERO.values()))
    x = jnp.eye(K)[:2]

    def loss(params, value):
        state, ys = n.apply(n.init(params), Tokens(x, value, x))
        return sum(jnp.sum(y + y**2) for y in jax.tree.leaves((ys, [s.start for s in state.levels])))

    params = float64(n.params(jax.random.key(0)))
    gradients = compiled(jax.grad(loss, (0, 1)))(params, jnp.zeros((2, K)))
    for g in jax.tree.leaves(gradients):
        assert np.isfinite(g).all() and (g != 0).any()


def test_adam_needs_eps_root_at_zero_inner_gradient(x64):
    """Why the rule above says eps_root: sqrt has no derivative at zero. The nest hides nothing."""
    x = jnp.zeros((2, K)).at[:, 0].set(1.0)

    def finite(tx):
        n = _one(tx, memory=linear_memory(K, K))
        loss = lambda p: jnp.sum(n.apply(n.init(p), Tokens(x, x @ p[0]["w"], x))[1] ** 2)  # noqa: E731
        return bool(np.isfinite(compiled(jax.grad(loss))(({"w": jnp.eye(K)},))[0]["w"]).all())

    assert finite(optax.adam(0.1, eps_root=1e-8))
    assert not finite(optax.adam(0.1))


# --- composition ----------------------------------------------------------------------------------------------------


def test_examples_of_a_batch_are_isolated(two_levels, x64, rng):
    """Spec test 36: vmap over examples; changing example 0 changes nothing in example 1, bit for bit."""
    params = float64(two_levels.params(jax.random.key(0)))
    batch = jax.tree.map(lambda *x: np.stack(x), make_tokens(rng, 8), make_tokens(rng, 8))
    run = compiled(jax.vmap(lambda xs: two_levels.apply(two_levels.init(params), xs)))
    state, ys = run(batch)
    other = jax.tree.map(lambda x: np.concatenate([x[:1] * 0.9, x[1:]]), batch)
    state2, ys2 = run(other)
    second = lambda tree: jax.tree.map(lambda x: x[1], tree)  # noqa: E731
    assert_close(second((state, ys)), second((state2, ys2)), 0)
    assert all((a[0] != b[0]).any() for a, b in zip(ys, ys2, strict=True))
    alone = from_scratch(two_levels, params, jax.tree.map(lambda x: x[1], batch))
    assert_close(second((state, ys)), alone)


def test_a_batch_of_carried_states(x64, rng):
    """vmap over states and tokens, in two calls, with the clock said or not."""
    n = _one(dgd(0.4), 2)
    params = float64(jax.vmap(n.params)(jax.random.split(jax.random.key(0), 2)))
    xs = jax.tree.map(lambda *x: np.stack(x), make_tokens(rng, 5, ()), make_tokens(rng, 5, ()))
    want = compiled(jax.vmap(lambda p, xs: n.apply(n.init(p), xs)))(params, xs)
    state = jax.vmap(n.init)(params)
    for phases in ((0, 3), (None, None)):
        now, ys = state, []
        for phase, part in zip(phases, (slice(0, 3), slice(3, 5)), strict=True):
            apply = jax.vmap(lambda s, xs, phase=phase: n.apply(s, xs, phase=phase))
            now, y = compiled(apply)(now, jax.tree.map(lambda x, part=part: x[:, part], xs))
            ys.append(y)
        assert_close((now.levels, jnp.concatenate(ys, axis=1)), (want[0].levels, want[1]))
        assert np.asarray(now.phase).tolist() == [1, 1]


def test_states_are_ordinary_pytrees_that_scan_and_jit(two_levels, whole):
    """A state goes through flatten and unflatten, and is the carry of an outer scan over tokens."""
    params, tokens, want, want_y = whole
    leaves, treedef = jax.tree.flatten(two_levels.init(params))
    assert all(isinstance(x, jax.Array | np.generic) for x in leaves)
    state = jax.tree.map(jnp.asarray, treedef.unflatten(leaves))

    def body(state, x):
        state, y = two_levels.apply(state, jax.tree.map(lambda a: a[None], x))
        return state, jax.tree.map(lambda a: a[0], y)

    assert_close(compiled(lambda s, xs: jax.lax.scan(body, s, xs))(state, tokens), (want, want_y))


def test_a_state_keeps_its_types(two_levels, rng):
    """Float32 in, float32 out, the phase an int32: a second call of the same program compiles nothing."""
    tokens = jax.tree.map(lambda x: x.astype(np.float32), make_tokens(rng, 6))
    state = jax.tree.map(jnp.asarray, two_levels.init(two_levels.params(jax.random.key(0))))
    out = jax.eval_shape(lambda s, xs: two_levels.apply(s, xs, phase=0), state, tokens)[0]
    types = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)  # noqa: E731
    assert types(out) == types(state)


def test_a_level_may_have_heads(x64, rng):
    """Leading axes of a memory's weights are independent heads; tokens are [T, H, K]."""
    n = _one(dgd(0.4), level={"read": "after"})
    params = float64(jax.vmap(n.params)(jax.random.split(jax.random.key(0), 2)))
    key, value, query = rng.normal(size=(3, 5, 2, K))
    state, y = from_scratch(n, params, Tokens(key, value, query))
    for h in range(2):
        own = jax.tree.map(lambda w, h=h: w[h], params)
        state_h, y_h = from_scratch(n, own, Tokens(key[:, h], value[:, h], query[:, h]))
        assert_close(y[:, h], y_h)
        assert_close(state.levels[0].start["w"][h], state_h.levels[0].start["w"])


def test_the_error_function_may_return_writes(x64, rng):
    """`Write(error, gates)` instead of a bare error: the same as the rule's own constants."""
    x = rng.normal(size=(4, K))
    memory = linear_memory(K, K, 1.0)

    def error(params, carry, x):
        return (Write({"w": Outer(x @ params[0]["w"] - x, x)}, {"eta": jnp.full(x.shape[:1], 0.3)}),), carry, None

    ours = nest(level(memory, dgd(), 2, objective=l2_regression), error=error)
    params = float64(ours.params(jax.random.key(0)))
    want, _ = from_scratch(_one(dgd(0.3)), params, Tokens(x, x))
    assert_close(from_scratch(ours, params, x)[0].levels, want.levels)


# --- what is refused ------------------------------------------------------------------------------------------------


LINEAR = linear_memory(K, K)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nest(), "at least one level"),
        (lambda: _clocks(4, 6), r"\[4, 6\]"),
        (lambda: _clocks(8, 4), r"\[8, 4\]"),
        (lambda: _clocks(2, 4, 10), r"\[2, 4, 10\]"),
        (lambda: nest(level(LINEAR, dgd(0.1), 4)), "objective"),
        (lambda: nest(level(None, dgd(0.1), 4, objective=l2_regression)), "memory"),
        (lambda: level(LINEAR, dgd(0.1), 0), "0"),
        (lambda: level(LINEAR, dgd(0.1), 4, bptt_chunks=0), "0"),
        (lambda: level(LINEAR, dgd(0.1), 4, read="end"), "'end'"),  # pyright: ignore
        (lambda: _mixed().params(jax.random.key(0)), r"\[1\]"),
        (lambda: _one(dgd(0.1)).init(({}, {})), "1"),
        (lambda: _one(dgd(0.1)).init({"w": jnp.zeros((K, K))}), "1"),
        (lambda: _run_lengths(4, 3), r"\[3, 4\]"),
    ],
)  # fmt: skip
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rule_that_writes_tokens_refuses_dense_errors():
    n = nest(level(LINEAR, dgd(0.1), 2), error=lambda params, carry, x: (params, carry, x))
    with pytest.raises(TypeError, match="Outer"):
        n.apply(n.init(n.params(jax.random.key(0))), jnp.zeros((2, K)))


def _clocks(*sizes):
    return nest(*(level(LINEAR, dgd(0.1), c, objective=l2_regression) for c in sizes))


def _run_lengths(keys, values):
    n = _one(dgd(0.1))
    return n.apply(n.init(n.params(jax.random.key(0))), Tokens(jnp.zeros((keys, K)), jnp.zeros((values, K))))


# --- gates of global levels -----------------------------------------------------------------------------------------


def test_a_global_level_steps_by_the_gates_of_its_chunk(x64, rng):
    """eta sums, alpha multiplies; a masked token does neither. In one call and in two with the phase unknown."""
    T, C, H = 7, 4, 2
    x, delta = rng.normal(size=(2, T, H, K))
    eta, alpha = rng.uniform(0.1, 0.9, (2, T, H))
    keep = np.arange(T) != 1

    def descend(updates, state, params=None, **gates):
        return jax.tree.map(lambda g: -gates["eta"] * g, updates), state

    descent = optax.GradientTransformationExtraArgs(optax.init_empty_state, descend)

    def error(params, carry, xs):
        x, delta, eta, alpha, keep = (jnp.moveaxis(a, 0, -2 if a.ndim == 3 else -1) for a in xs)
        dense = {"w": Outer(delta, x)}
        return (Write(dense, {"eta": eta, "alpha": alpha}, mask=keep),), carry, xs[0]

    fast = level(linear_memory(K, K), optax.chain(descent, retention()), C, gates=("eta", "log_alpha"))
    n = nest(fast, error=error)
    start = rng.normal(size=(H, K, K))
    xs = (x, delta, eta, alpha, keep)
    want = start
    for first in range(0, T - C + 1, C):
        ts = [t for t in range(first, first + C) if keep[t]]
        pull = np.einsum("THK,THV->HKV", x[ts], delta[ts]) * eta[ts].sum(0)[:, None, None]
        want = alpha[ts].prod(0)[:, None, None] * want - pull
    state, _ = from_scratch(n, ({"w": start},), xs)
    half, _ = from_scratch(n, ({"w": start},), take(xs, 0, 3))
    split, _ = compiled(n.apply)(half, take(xs, 3, T))
    assert_close(state.levels[0].start["w"], want)
    assert_close(split, state)
