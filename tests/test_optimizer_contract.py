"""The contract of every transformation in `optimizer_cases.py`, ours and optax's alike.

The idea is that of optax's own tests of contributed optimizers (optax/contrib/_common_test.py). A check that a case
does not pass is expected to fail, with the reason that the case gives.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hope_jax import Tokens, l2_regression, level, mlp_memory, nest
from tests.optimizer_cases import CASES, Case
from tests.oracles import assert_close, compiled

STEPS = 4  # of every trajectory: past a boundary of each clock
SHAPES = {"w": (3, 4), "bias": (4,)}


def _expected(reason: str):
    return pytest.mark.xfail(reason=reason, strict=True, raises=(AssertionError, ValueError, ZeroDivisionError))


def contract(check):
    """Runs a check with every case."""
    cases = []
    for name, case in CASES.items():
        reason = case.fails.get(check.__name__)
        cases.append(pytest.param(name, id=name, marks=[_expected(reason)] if reason else []))
    return pytest.mark.parametrize("name", cases)(check)


def _tree(case: Case, seed: int, dtype: Any = jnp.float32, **shapes: tuple[int, ...]) -> Any:
    rng = np.random.default_rng(seed)
    wanted = {n: s for n, s in (SHAPES | shapes).items() if len(s) > 1 or not case.matrices}
    return {n: jnp.asarray(rng.normal(size=s), dtype) for n, s in wanted.items()}


def _gradients(case: Case, dtype: Any = jnp.float32, **shapes: tuple[int, ...]) -> list[Any]:
    return [_tree(case, seed, dtype, **shapes) for seed in range(1, STEPS + 1)]


def _run(case: Case, tx: Any, params: Any, gradients: list[Any]) -> tuple[list[Any], Any, int]:
    """Updates of every step, the last state, and how often the step was compiled."""
    tx = optax.with_extra_args_support(tx)
    step: Any = compiled(lambda g, s, p: tx.update(g, s, p, **case.extra(p)))
    state, history = tx.init(params), []
    for g in gradients:
        updates, state = step(g, state, params)
        params = optax.apply_updates(params, updates)
        history.append(updates)
    return history, state, step._cache_size()


@functools.cache
def _trajectory(name: str) -> tuple[list[Any], Any, int]:
    """The plain one, that others are compared with."""
    case = CASES[name]
    return _run(case, case.make(**case.numbers), _tree(case, 0), _gradients(case))


def _size(history: list[Any]) -> float:
    return sum(float(jnp.sum(jnp.abs(u))) for u in jax.tree.leaves(history))


def _part(history: list[Any], like: Any) -> list[Any]:
    return [{name: updates[name] for name in like} for updates in history]


def _close(got: Any, want: Any) -> None:
    """Up to float32's rounding in a few products, grown by Newton-Schulz: its slope at zero is 3.4445^5 = 485."""
    assert_close(got, want, 1e-4)


@contract
def test_moves_and_compiles_once(name):
    history, _, compilations = _trajectory(name)
    assert compilations == 1
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(history))
    assert all(np.any(u != 0) for u in jax.tree.leaves(jax.tree.map(lambda *u: sum(map(np.abs, u)), *history)))


@contract
def test_accepts_unknown_arguments(name):
    """Meant for others in the same chain: the program is the same with and without them."""
    case = CASES[name]
    tx, params = optax.with_extra_args_support(case.make(**case.numbers)), _tree(case, 0)

    def program(**unknown):
        step = lambda g, s, p: tx.update(g, s, p, **case.extra(p), **unknown)  # noqa: E731
        return str(jax.make_jaxpr(step)(params, tx.init(params), params))

    assert program(value=1.0, unknown_argument=None, value_fn=lambda x: x) == program()


@contract
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_keeps_dtypes(name, dtype):
    """Of the gradients in the updates, and of everything in the state, so that it scans."""
    case = CASES[name]
    tx, params = optax.with_extra_args_support(case.make(**case.numbers)), _tree(case, 0, dtype)

    def step(g, s, p):
        return tx.update(g, s, p, **case.extra(p))

    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(step, params, state, params)
    assert jax.tree.map(lambda u: (u.shape, u.dtype), updates) == jax.tree.map(lambda p: (p.shape, p.dtype), params)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), after) == jax.tree.map(lambda s: (s.shape, s.dtype), state)


@contract
def test_scan_vmap_and_remat(name):
    """Two runs side by side, each a scan of rematerialised steps: the first is the plain trajectory."""
    case = CASES[name]
    tx = optax.with_extra_args_support(case.make(**case.numbers))
    first = jax.tree.map(lambda *g: jnp.stack(g), *_gradients(case))
    both = jax.tree.map(lambda g: jnp.stack([g, -2 * g]), first)
    params = _tree(case, 0)

    @jax.checkpoint
    def step(carry, g):
        p, s = carry
        updates, s = tx.update(g, s, p, **case.extra(p))
        return (optax.apply_updates(p, updates), s), updates

    run = compiled(jax.vmap(lambda gs: jax.lax.scan(step, (params, tx.init(params)), gs)[1]))
    got = jax.tree.map(lambda u: u[0], run(both))
    history, *_ = _trajectory(name)
    _close(got, jax.tree.map(lambda *u: jnp.stack(u), *history))


@contract
def test_injected_hyperparameters(name):
    """The same numbers from the state, and other numbers put there count."""
    case = CASES[name]
    tx: Any = optax.inject_hyperparams(case.make)(**case.numbers)
    params, gradients = _tree(case, 0), _gradients(case)
    step: Any = compiled(lambda g, s, p: tx.update(g, s, p, **case.extra(p)))

    def run(state):
        p, history = params, []
        for g in gradients:
            updates, state = step(g, state, p)
            p = optax.apply_updates(p, updates)
            history.append(updates)
        return history

    state = tx.init(params)
    _close(run(state), _trajectory(name)[0])
    still = state._replace(hyperparams=state.hyperparams | {"learning_rate": jnp.zeros(())})
    assert step._cache_size() == 1
    assert _size(run(still)) < _size(run(state))
    assert step._cache_size() == 1


@contract
def test_masked_and_none_leaves(name):
    """They are not there: what is masked away comes back as it went in, None stays None, the others do not notice."""
    case = CASES[name]
    params = _tree(case, 0)
    away = {"masked": jnp.ones((5, 2)), "none": None}
    seen = lambda tree: {n: n != "masked" for n in tree if n != "none"} | {"none": None}  # noqa: E731
    tx = optax.masked(case.make(**case.numbers), seen, mask_compatible_extra_args=True)
    masked_case = case._replace(
        extra=lambda p: case.extra({n: x for n, x in p.items() if n != "none"} | {"none": None})
    )
    history, *_ = _run(masked_case, tx, params | away, [g | away for g in _gradients(case)])
    for updates in history:
        assert updates["none"] is None
        assert_close(updates["masked"], away["masked"], 0)
    _close(_part(history, params), _trajectory(name)[0])


@contract
def test_empty_trees(name):
    case = CASES[name]
    tx: Any = optax.with_extra_args_support(case.make(**case.numbers))
    for empty in ({}, (), {"a": None}):
        updates, _ = tx.update(empty, tx.init(empty), empty, **case.extra(empty))
        assert updates == empty


@contract
def test_odd_leaves(name):
    """Scalars and arrays without elements beside the others, which do not notice."""
    case = CASES[name]
    odd: dict[str, tuple[int, ...]] = {"scalar": (), "empty": (0, 3), "empty_vector": (0,), "row": (1, 4)}
    params = _tree(case, 0, **odd)
    history, *_ = _run(case, case.make(**case.numbers), params, _gradients(case, **odd))
    for updates in history:
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
        assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
    for n in params:
        assert not params[n].size or any(np.any(u[n] != 0) for u in history)


@contract
def test_zero_gradients(name):
    """Finite updates and outer gradients, with respect to gradients and parameters, where every gradient is zero."""
    case = CASES[name]
    tx, params = optax.with_extra_args_support(case.make(**case.numbers)), _tree(case, 0)

    def outer(g, start):
        def step(carry, _):
            p, s = carry
            updates, s = tx.update(g, s, p, **case.extra(p))
            return (optax.apply_updates(p, updates), s), None

        (p, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=STEPS)
        return sum(jnp.sum(jnp.sin(x - 2 * s)) for x, s in zip(*map(jax.tree.leaves, (p, start)), strict=True))

    program: Any = compiled(jax.value_and_grad(outer, argnums=(0, 1)))
    value, slopes = program(jax.tree.map(jnp.zeros_like, params), params)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(s)) for s in jax.tree.leaves(slopes))
    assert any(np.any(s != 0) for s in jax.tree.leaves(slopes[0]))


@pytest.mark.slow
@contract
def test_writes_a_memory_as_the_rule_of_a_level(name):
    """An MLP memory over two writes: what it answers changes, and is finite."""
    case, memory = CASES[name], mlp_memory(4, 3)
    keys = jax.random.normal(jax.random.key(1), (8, 4))
    tokens = Tokens(key=keys, value=jnp.roll(keys, 1, axis=1), query=keys)
    nested = nest(level(memory, case.make(**case.numbers), 4, objective=l2_regression))
    start = nested.params(jax.random.key(0))
    state, _ = compiled(nested.apply)(nested.init(start), tokens)
    for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(state.levels[0].start), strict=True):
        assert np.all(np.isfinite(after)) and np.any(after != before)


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    """The states of all cases after their trajectories, saved by orbax and read again."""
    import orbax.checkpoint as ocp

    states = {name: _trajectory(name)[1] for name in CASES}
    folder = tmp_path_factory.mktemp("optimizers") / "states"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, states)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder, jax.eval_shape(lambda: states))


@contract
def test_a_state_is_saved_and_restored_bit_for_bit(name, restored):
    state = _trajectory(name)[1]
    assert jax.tree.structure(restored[name]) == jax.tree.structure(state)
    for a, b in zip(*map(jax.tree.leaves, (restored[name], state)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# --- sharded on eight devices -----------------------------------------------------------------------------------------

LARGE = {"w": (16, 8), "stack": (8, 4, 8), "bias": (8,)}
SPECS = {"w": P("x", "y"), "stack": P("x", None, "y"), "bias": P("x")}


@pytest.mark.slow
@contract
def test_a_state_is_sharded_like_its_parameter(name):
    """After init and after compiled steps that say nothing of shardings: the compiler replicates no momentum."""
    case = CASES[name]
    tx: Any = optax.with_extra_args_support(case.make(**case.numbers))
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    params = _tree(case, 0, **LARGE)
    shardings = {n: NamedSharding(mesh, SPECS[n]) for n in params}
    place = lambda tree: {n: jax.device_put(x, shardings[n]) for n, x in tree.items()}  # noqa: E731
    gradients = _gradients(case, **LARGE)
    history, *_ = _run(case, case.make(**case.numbers), params, gradients)

    is_masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731

    def over_state(f, state, others):
        """f(leaf, sharding of its parameter), and `others` of what is like no parameter."""
        return optax.tree.map_params(
            tx,
            lambda x, sharding: x if is_masked(x) else f(x, sharding),
            state,
            shardings,
            transform_non_params=others,
            is_leaf=is_masked,
        )

    same = lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim)  # noqa: E731
    step: Any = jax.jit(lambda g, s, p: tx.update(g, s, p, **case.extra(p)))
    p = place(params)
    everywhere = NamedSharding(mesh, P())  # counts; left on one device, the second call would compile again
    state = over_state(lambda x, _: x, tx.init(p), lambda x: jax.device_put(x, everywhere))
    for g, want in zip(gradients, history, strict=True):
        assert all(jax.tree.leaves(over_state(same, state, lambda _: True)))
        updates, state = step(place(g), state, p)
        assert all(same(u, shardings[n]) for n, u in updates.items())
        p = jax.tree.map(jnp.add, p, updates)
        _close(updates, want)
    assert all(jax.tree.leaves(over_state(same, state, lambda _: True)))
    assert step._cache_size() == 1


# --- optima -----------------------------------------------------------------------------------------------------------


def parabola(x):
    """Smallest at -1, 1, 3, ...: every coordinate alone."""
    return jnp.sum((x - (2.0 * jnp.arange(x.size) - 1)) ** 2)


def rosenbrock(x):
    """Smallest at ones, at the end of a curved valley."""
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


OPTIMA = {parabola: lambda n: 2.0 * np.arange(n) - 1, rosenbrock: np.ones}


@pytest.mark.slow
@contract
@pytest.mark.parametrize("target", OPTIMA, ids=lambda f: f.__name__)
def test_converges(name, target):
    """Matrix and vector each find the optimum of a standard target, with a learning rate that decays to zero."""
    case, steps = CASES[name], 20_000
    shapes = {"w": (2, 2), "stack": (2, 2, 2), "bias": (4,)}
    params = jax.tree.map(jnp.zeros_like, _tree(case, 0, **shapes))
    rate = optax.cosine_decay_schedule(case.rate, steps)
    tx: Any = optax.inject_hyperparams(case.make)(**(case.numbers | {"learning_rate": rate}))

    def loss(params):
        return sum(jnp.sum(jax.vmap(target)(x.reshape(-1, 4))) for x in jax.tree.leaves(params))

    def step(carry, _):
        p, s = carry
        updates, s = tx.update(jax.grad(loss)(p), s, p, **case.extra(p))
        return (optax.apply_updates(p, updates), s), None

    (after, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps))(params)
    for x in jax.tree.leaves(after):
        np.testing.assert_allclose(x.reshape(-1, 4), np.stack([OPTIMA[target](4)] * (x.size // 4)), atol=0.05)
