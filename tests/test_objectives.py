"""Objectives: the error at the output is the derivative of the loss (spec 2.2)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax import clipped_dot_product, dot_product, huber, huber_norm, l2_regression, lp_regression
from tests.oracles import TIGHT, assert_close


def _clip_norm(r, c):
    return r * np.minimum(1, c / np.linalg.norm(r, axis=-1, keepdims=True))


# name -> (objective, the table's delta as a function of r = y - v and v, and how far smoothing may move it)
CASES = {
    "dot_product": (dot_product, lambda r, v: -v, TIGHT),
    "l2": (l2_regression, lambda r, v: r, TIGHT),
    "lp1": (lp_regression(1.0), lambda r, v: np.sign(r), 1e-9),  # smoothing: (eps / r)^2 with |r| > 0.05
    "lp1.5": (lp_regression(1.5), lambda r, v: np.sign(r) * np.abs(r) ** 0.5, 1e-9),
    "lp2": (lp_regression(2.0), lambda r, v: r, TIGHT),
    "lp2.5": (lp_regression(2.5), lambda r, v: np.sign(r) * np.abs(r) ** 1.5, TIGHT),
    "lp3": (lp_regression(3.0), lambda r, v: np.sign(r) * np.abs(r) ** 2, TIGHT),
    "huber": (huber(0.7), lambda r, v: np.clip(r, -0.7, 0.7), TIGHT),
    "clipped_dot_product": (clipped_dot_product(1.5), lambda r, v: -_clip_norm(v, 1.5), TIGHT),
    "huber_norm": (huber_norm(1.5), lambda r, v: _clip_norm(r, 1.5), TIGHT),
}


@pytest.fixture
def pair(x64, rng):
    """Values v and outputs y [T, V]; every error is at least 0.05 in size, norms lie on both sides of 1.5."""
    v, r = rng.normal(size=(2, 12, 3))
    r = np.sign(r) * (0.05 + np.abs(r)) * np.linspace(0.2, 2, 12)[:, None]
    norms = np.linalg.norm(r, axis=-1)
    assert (norms < 1.5).any() and (norms > 1.5).any()
    assert (np.abs(r) < 0.7).any() and (np.abs(r) > 0.7).any()
    return v + r, v


@pytest.mark.parametrize("name", CASES)
def test_delta_is_the_gradient_of_the_loss(name, pair):
    objective, _, _ = CASES[name]
    y, v = pair
    want = jax.grad(lambda y: jnp.sum(objective.loss(y, v)))(y)
    assert objective.loss(y, v).shape == (12,)
    assert_close(objective.delta(y, v), want)


@pytest.mark.parametrize("name", CASES)
def test_delta_is_the_published_formula(name, pair):
    objective, formula, smoothing = CASES[name]
    y, v = pair
    assert_close(objective.delta(y, v), formula(y - v, v), smoothing)


@pytest.mark.parametrize("name", CASES)
def test_error_and_its_derivative_are_finite_at_zero_error(name, x64):
    objective, _, _ = CASES[name]
    v = jnp.array([0.5, -1.0, 0.0])
    assert np.isfinite(objective.delta(v, v)).all()
    assert np.isfinite(jax.grad(objective.loss)(v, v)).all()
    for argument in (0, 1):
        assert np.isfinite(jax.jacobian(objective.delta, argument)(v, v)).all()


def test_regressions_carry_one_half(x64):
    y, v = jnp.array([3.0, 4.0]), jnp.zeros(2)
    assert float(l2_regression.loss(y, v)) == 12.5
    assert float(lp_regression(2.0).loss(y, v)) == 12.5
    assert float(huber(10.0).loss(y, v)) == 12.5
    assert float(huber_norm(10.0).loss(y, v)) == 12.5
    assert float(huber_norm(1.0).loss(y, v)) == 4.5  # c ||r|| - c^2 / 2


@pytest.mark.parametrize(
    "make, bad", [(lp_regression, 0.5), (huber, 0.0), (huber_norm, -1.0), (clipped_dot_product, 0.0)]
)
def test_refuses_bad_constants(make, bad):
    with pytest.raises(ValueError, match=str(bad)):
        make(bad)
