"""The levels of a CMS in a model, written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.models.cms import CMSChain
from hope_jax.models.functional import functional
from tests.oracles import gelu, numpy64

D, HIDDEN = 4, (3, 5, 3)


@pytest.fixture(params=[False, True], ids=["sequential", "independent"])
def case(request, x64):
    """The functions, float64 parameters with gains and logits that are not at their start values, and an input."""
    independent = request.param
    init, apply = functional(
        lambda rngs: CMSChain(D, HIDDEN, out_gain=1.0, independent=independent, rngs=rngs)
    )  # fmt: skip
    draws = np.random.default_rng(0)
    params = jax.tree.map(lambda w: w + 0.3 * draws.normal(size=w.shape), numpy64(init(jax.random.key(0))))
    return independent, jax.tree.map(jnp.asarray, params), apply, draws.normal(size=(2, 5, D))


def _branch(level, x):
    unit = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    return gelu((unit * level["norm"]["scale"]) @ level["w2"]) @ level["w1"]


def test_levels_equal_the_formula(case):
    """A chain (S6.1), or all levels at the input, mixed by the softmax of their logits (74)."""
    independent, params, apply, x = case
    levels = [numpy64(params[f"level_{i}"]) for i in range(3)]
    if independent:
        share = np.exp(params["logits"]) / np.exp(params["logits"]).sum()
        expected = x + sum(a * _branch(level, x) for a, level in zip(share, levels, strict=True))
    else:
        expected = x
        for level in levels:
            expected = expected + _branch(level, expected)
    np.testing.assert_allclose(apply(params, jnp.asarray(x)), expected, rtol=0, atol=1e-12)


def test_independent_levels_have_no_order(case):
    """Levels permuted with their logits give the same output; a chain does not."""
    independent, params, apply, x = case
    swapped = {**params, "level_0": params["level_2"], "level_2": params["level_0"]}
    if independent:
        swapped["logits"] = params["logits"][::-1]
    difference = np.abs(apply(swapped, jnp.asarray(x)) - apply(params, jnp.asarray(x))).max()
    assert difference < 1e-12 if independent else difference > 1e-2
