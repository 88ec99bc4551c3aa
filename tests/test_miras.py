"""Links of Miras: dual to weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.miras import lq, softmax
from tests.oracles import assert_close


def test_lq_is_the_identity_for_two_and_finite_at_zero(x64, rng):
    dual = rng.normal(size=(2, 3, 4))
    assert_close(lq(2.0)(dual), dual)
    norm = np.sum(np.abs(dual[1]) ** 3) ** (1 / 3)
    assert_close(lq(3.0)(dual)[1], dual[1] / norm)
    value, slope = jax.value_and_grad(lambda a: jnp.sum(lq(4.0)(a)))(jnp.zeros((3, 4)))
    assert value == 0
    assert np.isfinite(slope).all()


def test_kl_retention_is_the_power_of_the_weights(x64, rng):
    """softmax(alpha A - eta G) from the dual is softmax(alpha log W - eta G) from the weights."""
    dual, gradient = rng.normal(size=(2, 3, 4))
    w = softmax(dual)
    assert_close(w.sum(axis=0), np.ones(4))
    assert_close(softmax(0.9 * dual - 0.3 * gradient), softmax(0.9 * jnp.log(w) - 0.3 * gradient))


def test_a_bad_exponent_is_named():
    with pytest.raises(ValueError, match="lq needs q >= 2; got 1"):
        lq(1)
