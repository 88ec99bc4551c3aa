"""Prefixes of the final representation: what each predicts, and that the last is the model itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.models import ModelConfig, build_lm, matryoshka, matryoshka_losses, prefix_widths
from hope_jax.training.documents import cross_entropy
from tests.models.cases import CASES, distinct_tokens

TRANSFORMER = CASES["transformer"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_prefix_is_the_head_cut_off(tied):
    """Against the definition, h[:m] E[:, :m]^T; the last prefix is the plain model, bit for bit."""
    config, tokens = dataclasses.replace(TRANSFORMER, tie_embeddings=tied), distinct_tokens()
    lm, plain = matryoshka(config), build_lm(config)
    params = jax.jit(lm.init)(jax.random.key(0))
    both = jax.jit(lambda p: [one.apply(p, one.init_state(p, 2), tokens, phase=0)[1] for one in (lm, plain)])
    (h, logits), want = both(params)
    rows = np.asarray(params["embedding"] if tied else params["head"].T)
    for width, found in zip((2, 4, 8, 16), logits, strict=True):
        np.testing.assert_allclose(found, np.asarray(h)[..., :width] @ rows[:, :width].T, atol=1e-6)
    np.testing.assert_array_equal(logits[-1], want)


def test_the_whole_alone_is_the_plain_loss():
    """c = (0, 0, 0, 1): loss and gradients, bit for bit."""
    tokens, lm, plain = distinct_tokens(), matryoshka(TRANSFORMER), build_lm(TRANSFORMER)
    targets = jnp.roll(tokens, -1, axis=1)
    params = jax.jit(lm.init)(jax.random.key(0))

    def compiled(lm, losses):
        def total(p):
            return losses(lm.apply(p, lm.init_state(p, 2), tokens, phase=0)[1], targets).mean()

        return jax.jit(jax.value_and_grad(total))(params)

    only = compiled(lm, functools.partial(matryoshka_losses, (0.0, 0.0, 0.0, 1.0)))
    jax.tree.map(np.testing.assert_array_equal, only, compiled(plain, cross_entropy))


def test_losses_are_a_weighted_sum(rng):
    logits = [jnp.asarray(rng.normal(size=(2, 3, 5)), jnp.float32) for _ in range(3)]
    targets = jnp.asarray(rng.integers(0, 5, (2, 3)))
    found = matryoshka_losses((0.5, 0.0, 2.0), (jnp.zeros((2, 3, 4)), tuple(logits)), targets)
    want = 0.5 * cross_entropy(logits[0], targets) + 2 * cross_entropy(logits[2], targets)
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_parameters_are_those_of_the_model():
    config = CASES["hope"]
    shapes = [jax.eval_shape(lm.init, jax.random.key(3)) for lm in (matryoshka(config), build_lm(config))]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("config", "count", "message"),
    [
        (ModelConfig(dim=20, heads=2), 4, "4 prefixes, .* do not fit dim=20"),
        (ModelConfig(), 0, "0 prefixes"),
        (CASES["hope_fast"], 2, r"without levels that adapt inside the sequence; got chunks of \(4, 8\)"),
    ],
)
def test_refusals(config, count, message):
    with pytest.raises(ValueError, match=message):
        prefix_widths(config, count)
