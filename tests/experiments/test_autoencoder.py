"""The compression model: what its decoder may know, and that the encoder is the library's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.autoencoder import autoencoder
from hope_jax.models import ModelConfig, build_lm

CONFIG = ModelConfig(name="transformer", vocab_size=6, dim=8, layers=1, heads=2, max_length=5, tie_embeddings=False)


TOKENS = jnp.array([[0, 3, 1, 2, 5]])


@pytest.fixture(scope="module")
def model():
    return autoencoder(CONFIG, 5)


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(model.init)(jax.random.key(0))


def test_it_is_the_decoder_of_the_last_vector(model, params):
    """The decoder in numpy, from the last vector that the library's logits under a square head show."""
    square = dataclasses.replace(CONFIG, vocab_size=CONFIG.dim)
    lm = build_lm(square)
    head = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    whole = {**params["encoder"], "head": jnp.asarray(head)}
    logits = jax.jit(lambda p: lm.apply(p, lm.init_state(p, 1), TOKENS, phase=0)[1])(whole)
    h = np.linalg.solve(head.T.astype(float), np.asarray(logits)[0, -1])

    def norm(x):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)

    def gelu(x):
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    place = np.array([[f(t / 10_000 ** (i / 4)) for f in (np.sin, np.cos) for i in range(4)] for t in range(5)])
    decoder = {name: np.asarray(weight) for name, weight in params["decoder"].items()}
    x = gelu(norm(gelu(norm(h + place) @ decoder["w_1"])) @ decoder["w_2"])
    expected = norm(x) @ decoder["w_out"]
    # The vector went through a linear solve in float32 data: its error is the head's condition number times epsilon.
    atol = 100 * np.linalg.cond(head) * np.finfo(np.float32).eps
    np.testing.assert_allclose(jax.jit(model.apply)(params, TOKENS)[0], expected, rtol=0, atol=atol)


def test_every_parameter_is_trained(model, params):
    grads = jax.jit(jax.grad(lambda p: (model.apply(p, TOKENS) ** 2).sum()))(params)
    largest = jax.jit(lambda tree: jax.tree.map(lambda leaf: jnp.abs(leaf).max(), tree))(grads)
    assert all(float(value) > 0 for value in jax.tree.leaves(largest))
    assert "head" not in params["encoder"]


def test_tied_embeddings_are_refused():
    with pytest.raises(ValueError, match="tie_embeddings=False"):
        autoencoder(ModelConfig(name="transformer"), 5)
