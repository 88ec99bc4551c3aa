"""A faster level in front of a CMS: the function stays, and the level can learn (spec 6.8)."""

import jax
import numpy as np
import pytest

from hope_jax.models import ModelConfig, add_fast_level, build_lm
from tests.models.cases import next_token_loss

SMALL = {"vocab_size": 16, "dim": 8, "layers": 2, "heads": 2, "memory_hidden": 4, "cms_hidden": (12,)}


def logits(config, params, tokens):
    lm = build_lm(config)
    return jax.jit(lambda params: lm.apply(params, lm.init_state(params, 2), tokens, phase=0)[1])(params)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 12), 0, SMALL["vocab_size"])


@pytest.mark.parametrize("name", ["hope_attention", pytest.param("hope", marks=pytest.mark.slow)])
def test_two_new_levels_change_no_bit(name, tokens):
    config = ModelConfig(name=name, **SMALL)
    params = build_lm(config).init(jax.random.key(0))
    grown = add_fast_level(add_fast_level((config, params), hidden=6), key=jax.random.key(7))
    assert grown.config.cms_hidden == (6, 6, 12)
    assert jax.tree.map(np.shape, grown.params) == jax.tree.map(
        np.shape, build_lm(grown.config).init(jax.random.key(0))
    )
    np.testing.assert_array_equal(logits(*grown, tokens), logits(config, params, tokens))
    chain = grown.params["blocks"]["cms"]
    assert chain["level_2"] is params["blocks"]["cms"]["level_0"]
    assert all(np.any(chain[level]["w2"]) and not np.any(chain[level]["w1"]) for level in ("level_0", "level_1"))
    assert not np.array_equal(chain["level_0"]["w2"], chain["level_1"]["w2"])


def test_a_new_level_learns(tokens):
    """At first W1 alone has a gradient; one step along it, W2 has one too."""
    config = ModelConfig(name="hope_attention", **SMALL)
    grown = add_fast_level((config, build_lm(config).init(jax.random.key(0))))
    lm = build_lm(grown.config)

    @jax.jit
    @jax.grad
    def gradient(params):
        return next_token_loss(lm.apply(params, lm.init_state(params, 2), tokens, phase=0)[1], tokens)

    def gradients(params):
        new = gradient(params)["blocks"]["cms"]["level_0"]
        return {name: float(np.abs(new[name]).max()) for name in ("w1", "w2")}

    first = gradients(grown.params)
    assert first["w1"] > 0 and first["w2"] == 0
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, grown.params, gradient(grown.params))
    assert gradients(moved)["w2"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "transformer"}, "name='transformer' has none"),
        ({"cms_chunks": (4,)}, r"cms_chunks=\(4,\)"),
        ({"cms_variant": "independent"}, "takes its share of the mixture"),
    ],
)
def test_what_cannot_take_a_level(changes, message):
    config = ModelConfig(**{"name": "hope_attention", **SMALL, **changes})
    with pytest.raises(ValueError, match=message):
        add_fast_level((config, {}))
