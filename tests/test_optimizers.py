"""`every` and `cms_schedule`, clocks of several optimizer steps (spec 4.9), and momenta between tasks (4.10)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax import carry_momentum, cms_schedule, deep_momentum, every, m3, reset_momentum, retention, steps_until_due
from tests.oracles import assert_close, compiled, primitives

K = 4  # a power of two: dividing by it is exact
W: Any = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5]])}


def _gradients(n, seed=0):
    rng = np.random.default_rng(seed)
    return [{"a": jnp.asarray(rng.normal(size=2), jnp.float32), "b": jnp.ones((1, 1)) * i} for i in range(n)]


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_zeros_between_and_the_rule_on_the_reduced_gradients_at_multiples(reduce):
    """Bit for bit, with a rule that has a state and looks at the weights."""
    inner: Any = optax.adamw(0.1)
    tx: Any = every(K, inner, reduce)
    step, inner_step = compiled(tx.update), compiled(inner.update)
    state, inner_state, w = tx.init(W), inner.init(W), W
    gradients = _gradients(2 * K + 1)
    for i, g in enumerate(gradients):
        updates, state = step(g, state, w)
        if (i + 1) % K:
            assert_close(updates, jax.tree.map(jnp.zeros_like, W), 0)
        else:
            total = jax.tree.map(lambda a, b, c, d: ((a + b) + c) + d, *gradients[i - K + 1 : i + 1])
            if reduce == "mean":
                total = jax.tree.map(lambda x: x / K, total)
            want, inner_state = inner_step(total, inner_state, w)
            assert_close(updates, want, 0)
            assert_close(state.inner, inner_state, 0)
            assert all(np.any(u != 0) for u in jax.tree.leaves(updates))
        w = optax.apply_updates(w, updates)
    assert int(state.due) == K - 1
    assert_close(state.pending, gradients[-1], 0)


def test_every_step_is_the_rule_itself():
    inner: Any = optax.adam(0.1)
    tx: Any = every(1, inner)
    state, want = tx.init(W), inner.init(W)
    assert_close(state, want, 0)
    for g in _gradients(2):
        a, state = tx.update(g, state, W)
        b, want = inner.update(g, want, W)
        assert_close((a, state), (b, want), 0)


def test_the_rule_is_not_computed_while_waiting():
    """Its square root is in one branch of one conditional and nowhere else."""
    tx: Any = every(K, optax.adam(0.1))
    jaxpr = jax.make_jaxpr(tx.update)(W, tx.init(W), W).jaxpr
    (cond,) = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    wait, step = (primitives(b.jaxpr) for b in cond.params["branches"])
    outside = {e.primitive.name for e in jaxpr.eqns}
    assert "sqrt" in step
    assert "sqrt" not in wait | outside


def test_levels_of_different_clocks_side_by_side():
    """Spec test 30: each leaf moves exactly at its own multiples."""
    tx: Any = optax.partition({"fast": optax.sgd(1.0), "slow": every(4, optax.sgd(1.0))}, {"a": "fast", "b": "slow"})
    state = tx.init(W)
    for i, g in enumerate(_gradients(8)):
        updates, state = tx.update(g, state, W)
        assert np.any(updates["a"] != 0)
        assert bool(np.any(updates["b"] != 0)) == ((i + 1) % 4 == 0)


def test_extra_arguments_reach_the_rule():
    def update(updates: Any, state: Any, params: Any = None, *, gain: float, **_: Any):
        return jax.tree.map(lambda x: gain * x, updates), state

    rule: Any = update
    scaled = optax.GradientTransformationExtraArgs(optax.identity().init, rule)
    tx: Any = every(2, scaled)
    state = tx.init(W)
    _, state = tx.update(W, state, W, gain=3.0)
    updates, _ = tx.update(W, state, W, gain=3.0)
    assert_close(updates, jax.tree.map(lambda x: 6.0 * x, W), 0)


def test_keeps_the_dtype_of_the_gradients():
    """Low-precision gradients come out as they went in, from both branches."""
    g = jnp.ones(2, jnp.bfloat16)
    tx: Any = every(2, optax.adam(0.1))
    updates, state = tx.update(g, tx.init(g), g)
    assert updates.dtype == jnp.bfloat16
    assert tx.update(g, state, g)[0].dtype == jnp.bfloat16


def test_float32_gates_keep_low_precision_states():
    """The branches of the conditional agree, and pending sums keep the dtype of the weights."""
    w = jnp.ones(2, jnp.bfloat16)
    tx: Any = every(2, optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(0.1), retention()))
    state = tx.init(w)
    for _ in range(2):
        updates, new = tx.update(jnp.ones(2, jnp.float32), state, w, alpha=jnp.float32(0.5))
        assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)
        assert updates.dtype == jnp.float32
        state = new


def test_runs_under_scan_and_vmap():
    """One program for a run of steps, and independent clocks side by side."""
    tx: Any = every(2, optax.sgd(1.0))
    gs = jnp.arange(12.0).reshape(2, 6)

    def run(gs):
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(jnp.zeros(())), gs)[1]

    want = np.zeros((2, 6))
    want[:, 1::2] = -(np.asarray(gs)[:, ::2] + np.asarray(gs)[:, 1::2])
    assert_close(jax.vmap(run)(gs), want, 0)


def test_refuses_bad_arguments():
    for k in (0, 2.5):
        with pytest.raises(ValueError, match=f"whole number of steps, 1 .* got {k}"):
            every(k, optax.sgd(1.0))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'max'"):
        every(2, optax.sgd(1.0), reduce="max")


# --- levels by label --------------------------------------------------------------------------------------------------

LEVELS: Any = {"level_0": jnp.array([1.0]), "level_1": {"w": jnp.array([[2.0]])}, "level_2": jnp.array(3.0)}
NAMES = {"level_0": "fast", "level_1": {"w": "slow"}, "level_2": "slower"}
PERIODS = {"fast": 1, "slow": 2, "slower": 4}


@pytest.mark.parametrize("by_function", [False, True])
def test_each_level_is_its_own_rule_on_its_own_reduced_gradients(by_function):
    """Bit for bit Adam on the mean of the period's gradients; the state counts down to the next update."""
    rule: Any = optax.adam(0.1)
    tx: Any = cms_schedule(PERIODS, rule, (lambda p: NAMES) if by_function else NAMES, reduce="mean")
    step, rule_step = compiled(tx.update), compiled(rule.update)
    state = tx.init(LEVELS)
    own = {name: rule.init(w) for name, w in LEVELS.items()}
    sums = jax.tree.map(jnp.zeros_like, LEVELS)
    for t in range(8):
        due = steps_until_due(state)
        assert {label: int(n) for label, n in due.items()} == {label: k - t % k for label, k in PERIODS.items()}
        g = jax.tree.map(lambda x, t=t: x + t, LEVELS)
        updates, state = step(g, state, LEVELS)
        sums = jax.tree.map(jnp.add, sums, g)
        for name, k in zip(LEVELS, PERIODS.values(), strict=True):
            if (t + 1) % k:
                assert_close(updates[name], jax.tree.map(jnp.zeros_like, LEVELS[name]), 0)
            else:
                mean = jax.tree.map(lambda x, k=k: x / k, sums[name])
                want, own[name] = rule_step(mean, own[name], LEVELS[name])
                assert_close(updates[name], want, 0)
                sums[name] = jax.tree.map(jnp.zeros_like, sums[name])


def test_each_level_may_have_a_rule_of_its_own():
    rules = {"fast": optax.sgd(1.0), "slow": optax.sgd(10.0), "slower": optax.sgd(100.0)}
    tx: Any = cms_schedule(PERIODS, rules, NAMES)
    state, total = tx.init(LEVELS), jax.tree.map(jnp.zeros_like, LEVELS)
    for _ in range(4):
        updates, state = tx.update(LEVELS, state, LEVELS)
        total = jax.tree.map(jnp.add, total, updates)
    want = {"level_0": -4 * LEVELS["level_0"], "level_1": {"w": -40 * LEVELS["level_1"]["w"]}}
    assert_close(total, want | {"level_2": -400 * LEVELS["level_2"]}, 0)


def test_a_level_is_not_computed_between_its_writes():
    """Two slow levels, two conditionals; Adam's square root is in their stepping branches, and outside for the fast."""
    tx: Any = cms_schedule(PERIODS, optax.adam(0.1), NAMES)
    jaxpr = jax.make_jaxpr(tx.update)(LEVELS, tx.init(LEVELS), LEVELS).jaxpr
    conds = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    assert len(conds) == 2
    for cond in conds:
        wait, step = (primitives(b.jaxpr) for b in cond.params["branches"])
        assert "sqrt" in step and "sqrt" not in wait
    assert sum(e.primitive.name == "sqrt" for e in jaxpr.eqns) == 1


def test_when_a_bare_rule_is_due():
    tx: Any = every(3, optax.sgd(1.0))
    state = tx.init(W)
    seen = []
    for _ in range(4):
        seen.append(int(steps_until_due(state)))
        _, state = tx.update(W, state, W)
    assert seen == [3, 2, 1, 3]
    assert int(steps_until_due(optax.adam(0.1).init(W))) == 1


def test_when_a_clock_inside_a_chain_is_due():
    clipped = optax.chain(optax.clip_by_global_norm(1.0), every(3, optax.sgd(1.0)))
    assert int(steps_until_due(clipped.init(W))) == 3
    levels = optax.chain(optax.clip_by_global_norm(1.0), cms_schedule(PERIODS, optax.sgd(1.0), NAMES))
    assert {label: int(n) for label, n in steps_until_due(levels.init(LEVELS)).items()} == PERIODS


def test_a_long_sum_in_bfloat16_does_not_stop_growing():
    """Ones added to 256 in bfloat16 are lost; the sum is in float32."""
    w: Any = jnp.ones(1, jnp.bfloat16)
    tx: Any = every(512, optax.sgd(1.0), reduce="mean")
    _, updates = jax.lax.scan(lambda s, _: tx.update(w, s, w)[::-1], tx.init(w), length=512)
    assert updates.dtype == w.dtype
    assert_close(updates[-1], -w, 0)


@pytest.mark.parametrize("make, message", [
    (lambda: cms_schedule({"fast": 0}, optax.sgd(1.0), NAMES), "'fast' takes a whole number of steps, 1 .* got 0"),
    (lambda: cms_schedule(PERIODS, optax.sgd(1.0), NAMES, reduce="max"), "'max'"),
    (lambda: cms_schedule(PERIODS, {"fast": optax.sgd(1.0)}, NAMES), "periods for 'fast', 'slow', 'slower' and rules"),
    (lambda: cms_schedule({"fast": 1, "slow": 2}, optax.sgd(1.0), NAMES).init(LEVELS),
     "level_2 has the label 'slower', which has no period; there are 'fast', 'slow'"),
    (lambda: cms_schedule(PERIODS | {"frozen": 8}, optax.sgd(1.0), NAMES).init(LEVELS),
     "no parameter has the label 'frozen'"),
])  # fmt: skip
def test_levels_refuse_with_the_label_and_the_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- momenta between tasks --------------------------------------------------------------------------------------------

M: Any = {"a": jnp.array([1.0, -2.0]), "w": jnp.array([[0.5, 1.0], [2.0, 3.0]])}
SCHEDULE = optax.linear_schedule(0.1, 0.0, 10)
TASKS = {  # name: (transformation, paths in its state that are carried; everything else starts again)
    "sgd": (optax.sgd(SCHEDULE, momentum=0.9), ["1/count"]),
    "adamw": (optax.adamw(SCHEDULE), ["2/count"]),
    "clipped": (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(SCHEDULE, momentum=0.9)), ["1/1/count"]),
    "every": (every(2, optax.adam(SCHEDULE)), ["inner/1/count"]),
    "levels": (
        cms_schedule({"a": 1, "w": 2}, optax.adam(SCHEDULE), {"a": "a", "w": "w"}),
        ["inner_states/a/inner_state/1/count", "inner_states/w/inner_state/inner/1/count"],
    ),
    "m3": (
        m3(SCHEDULE, scales=(1, 2)),
        ["inner_states/matrix/inner_state/2/count", "inner_states/other/inner_state/2/count"],
    ),
    "deep": (deep_momentum(0.1), []),
    "injected": (
        optax.inject_hyperparams(optax.adam)(SCHEDULE),
        ["count", "hyperparams_states/learning_rate/count"]
        + [f"hyperparams/{name}" for name in ("b1", "b2", "eps", "eps_root", "learning_rate")],
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_momenta_start_again_with_what_belongs_to_them_and_schedules_go_on(name):
    tx: Any
    tx, carried = TASKS[name]
    step, fresh = compiled(tx.update), tx.init(M)
    state = fresh
    for _ in range(3):  # a boundary of every level, and one step of the next period
        _, state = step(M, state, M)
    after = reset_momentum(tx, state, M)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    seen = []
    for (path, new), old, first in zip(
        jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(state), jax.tree.leaves(fresh), strict=True
    ):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        seen += [path] if path in carried else []
        np.testing.assert_array_equal(new, old if path in carried else first, err_msg=path)
    assert sorted(seen) == sorted(carried)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (after, state)), strict=True))


@pytest.mark.parametrize("name", ["sgd", "adamw", "m3"])
def test_the_switch_changes_the_first_update_of_the_next_task(name):
    """Carried is not stopping, bit for bit; reset is the first update of a new run, at the schedule's learning rate."""
    tx: Any = TASKS[name][0]
    step, other = compiled(tx.update), jax.tree.map(lambda x: -3 * x, M)
    state = tx.init(M)
    for _ in range(4):
        _, state = step(M, state, M)
    first = {f.__name__: step(other, f(tx, state, M), M)[0] for f in (carry_momentum, reset_momentum)}
    assert_close(first["carry_momentum"], step(other, state, M)[0], 0)
    fresh, _ = step(other, tx.init(M), M)
    assert_close(first["reset_momentum"], jax.tree.map(lambda x: x * SCHEDULE(4) / SCHEDULE(0), fresh), 1e-6)
    assert not np.allclose(first["carry_momentum"]["w"], first["reset_momentum"]["w"], rtol=0.1)


def test_a_reset_needs_no_concrete_numbers():
    """Inside a compiled step, for a boundary that is itself a traced condition."""
    tx: Any = optax.adam(0.1)
    _, state = tx.update(M, tx.init(M), M)
    switch = jax.jit(
        lambda boundary, s: jax.lax.cond(
            boundary, lambda s: reset_momentum(tx, s, M), lambda s: carry_momentum(tx, s, M), s
        )
    )
    assert_close(switch(True, state), tx.init(M), 0)
    assert_close(switch(False, state), state, 0)


def test_one_array_as_parameters():
    tx: Any = optax.adam(SCHEDULE)
    w = jnp.ones(())
    _, state = tx.update(w, tx.init(w), w)
    adam, schedule = reset_momentum(tx, state, w)
    assert_close(adam, tx.init(w)[0], 0)
    assert int(schedule.count) == 1
