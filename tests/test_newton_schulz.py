"""Newton-Schulz against the singular value decomposition in float64 (spec 4.6, tests 9)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hope_jax import newton_schulz
from tests.oracles import assert_close

N = 3  # matrices in a stack


def _matrices(rng, rows, columns, values) -> Any:
    """A stack of N matrices [rows, columns], each with these singular values in its own directions."""
    u, _ = np.linalg.qr(rng.normal(size=(N, rows, rows)))
    v, _ = np.linalg.qr(rng.normal(size=(N, columns, columns)))
    r = min(rows, columns)
    return u[..., :r] * values @ v[..., :r].mT, u[..., :r], v[..., :r]


def _in_directions(y, u, v):
    """y in the singular directions of the input: diagonal, if y has the same directions."""
    return np.asarray(u.mT @ np.asarray(y, np.float64) @ v)


@pytest.mark.parametrize("shape", [(3, 5), (2, 5, 3)])
def test_the_cubic_converges_to_the_polar_factor(shape, x64, rng):
    x: Any = rng.normal(size=shape)
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    assert_close(newton_schulz(x, 30, "cubic"), u @ vt, 1e-10)


@pytest.mark.parametrize("kind, step", [
    ("quintic", lambda s, s0: 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5),
    ("cubic", lambda s, s0: 1.5 * s - 0.5 * s**3),
    ("eq44", lambda s, s0: s - 0.25 * ((s - s0) + 2 * s * (s**2 - 1))),
])  # fmt: skip
@pytest.mark.parametrize("rows, columns", [(4, 6), (6, 4), (5, 5)])
def test_a_step_acts_on_the_singular_values_alone(kind, step, rows, columns, x64, rng):
    """Stacked matrices: the singular vectors stay, each value follows the scalar iteration."""
    values = rng.uniform(0.1, 1, min(rows, columns))
    x, u, v = _matrices(rng, rows, columns, values)
    want = start = values / (np.linalg.norm(values) + 1e-7)
    for _ in range(4):
        want = step(want, start)
    assert_close(_in_directions(newton_schulz(x, 4, kind), u, v), np.stack([np.diag(want)] * N))


@pytest.mark.parametrize("smallest, most", [(0.01, 1.14), (0.003, 1.21)])
@pytest.mark.parametrize("tall", [False, True])
def test_five_quintic_steps_keep_singular_values_near_one(smallest, most, tall, rng):
    """Any value down to `smallest` of the norm, float32, whole stacks wide and tall."""
    values = np.geomspace(smallest, 0.4, 60)
    values *= np.sqrt((1 - values[0] ** 2) / np.sum(values[1:] ** 2)) ** (np.arange(60) > 0)  # unit norm
    x, *_ = _matrices(rng, 80, 60, values) if tall else _matrices(rng, 60, 80, values)
    assert np.isclose(np.linalg.norm(values), 1) and np.isclose(values[0], smallest)
    got = np.linalg.svd(np.asarray(newton_schulz(jnp.asarray(7 * x, jnp.float32)), np.float64), compute_uv=False)
    assert got.shape == (N, 60)
    assert 0.68 - 1e-2 < got.min() <= got.max() < most + 1e-2


def test_the_whole_interval_of_five_quintic_steps(x64):
    """The bounds on a fine grid, a stack of diagonal matrices, and that they are no looser than they need be."""
    for smallest, most in ((0.01, 1.14), (0.003, 1.21)):
        s = np.geomspace(smallest, 1, 20001)
        pairs = np.stack([s, np.sqrt(1 - s**2)], axis=-1)[..., None] * np.eye(2)
        got = np.asarray(newton_schulz(jnp.asarray(pairs)))[:, 0, 0]
        assert 0.68 < got.min() < 0.70
        assert most - 0.02 < got.max() < most


def test_eq44_ends_between_the_start_and_the_polar_factor(x64, rng):
    """The root of 2 s^3 - s = s_0 in [0.707, 1], down to tiny singular values."""
    values = np.array([1e-6, 1e-3, 0.1, 0.4, 0.9])
    x, u, v = _matrices(rng, 5, 7, values)
    got = _in_directions(newton_schulz(x, 150, "eq44"), u, v)
    start = values / (np.linalg.norm(values) + 1e-7)
    s = np.diagonal(got, axis1=1, axis2=2)
    assert_close(got, s[..., None] * np.eye(5), 1e-10)
    assert_close(2 * s**3 - s, np.stack([start] * N), 1e-10)
    assert s.min() >= np.sqrt(0.5) and s.max() <= 1


def test_eq44_descends_its_objective(x64, rng):
    """One step is x - 1/4 of the gradient of 1/2 ||x - g||^2 + 1/2 ||x^T x - I||^2 at the normalised start g."""
    g = rng.normal(size=(4, 4))
    g = jnp.asarray(g / np.linalg.norm(g))

    def objective(x):
        return jnp.sum((x - g) ** 2) / 2 + jnp.sum((x.T @ x - jnp.eye(4)) ** 2) / 2

    two = newton_schulz(g, 1, "eq44")
    assert_close(two, g - jax.grad(objective)(g) / 4, 1e-6)  # newton_schulz divides by the norm + 1e-7
    assert_close(newton_schulz(g, 2, "eq44"), two - jax.grad(objective)(two) / 4, 1e-6)


def test_zero_is_zero_with_a_finite_gradient():
    zero = jnp.zeros((2, 3), jnp.bfloat16)
    outcome: Any = jax.jit(jax.value_and_grad(lambda x: jnp.sum(newton_schulz(x))))(zero)
    value, slope = outcome
    assert value.dtype == slope.dtype == jnp.bfloat16
    assert value == 0
    assert np.isfinite(np.asarray(slope, np.float32)).all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 3)])
def test_nothing_is_nothing(shape):
    assert newton_schulz(jnp.zeros(shape)).shape == shape


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P(None, None, "x"), P(None, "x", "y")])
def test_sharded_stacks(spec, rng):
    """The same numbers wherever the stack is cut; cut between matrices, no device hears of another's."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    x = jnp.asarray(rng.normal(size=(8, 16, 8)), jnp.float32)
    sharding = NamedSharding(mesh, spec)
    program = jax.jit(newton_schulz).lower(jax.device_put(x, sharding)).compile()
    y: Any = program(jax.device_put(x, sharding))
    np.testing.assert_allclose(y, newton_schulz(x), rtol=0, atol=1e-5)  # ten products of float32
    if spec == P("x"):
        assert y.sharding.is_equivalent_to(sharding, 3)
        assert not [name for name in ("all-reduce", "all-gather", "collective") if name in str(program.as_text())]


def test_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match='"quintic", "cubic" or "eq44"; got \'quartic\''):
        newton_schulz(jnp.ones((2, 2)), kind="quartic")
    with pytest.raises(ValueError, match="at least 1; got 0"):
        newton_schulz(jnp.ones((2, 2)), steps=0)
    with pytest.raises(ValueError, match=r"needs matrices \[..., K, V\]; got shape \(3,\)"):
        newton_schulz(jnp.ones(3))
