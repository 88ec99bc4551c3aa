"""Levels made of a trained Transformer's MLPs (spec 6.7)."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.models import ModelConfig, build_lm, stack_levels
from hope_jax.models.lm import skeleton
from tests.models.cases import next_token_loss

CONFIG = ModelConfig(name="transformer", vocab_size=12, dim=8, layers=4, heads=2, max_length=16, mlp_hidden=6)
LEVELS = {(0, 2): 2, 3: 4, 1: None}
SIZES = [2, None, 2, 4]  # by layer
ETA, LENGTH = 0.5, 11


@pytest.fixture(scope="module")
def model():
    """Float64 parameters of order one, stacked levels over them, tokens, and the parallel call."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), skeleton(CONFIG).init(jax.random.key(0)))
        params["embedding"] = 25 * params["embedding"]
        stacked = stack_levels((CONFIG, params), LEVELS, eta=ETA)
        lm = build_lm(stacked.config)
        tokens = jax.random.randint(jax.random.key(1), (2, LENGTH), 0, CONFIG.vocab_size)
        forward = jax.jit(lambda tokens: lm.apply(params, lm.init_state(params, 2), tokens, phase=0)[1])
        return types.SimpleNamespace(
            params=params, stacked=stacked, lm=lm, tokens=tokens, forward=forward, logits=forward(tokens)
        )


def _logits(config, model):
    lm = build_lm(config)
    return jax.jit(lambda params: lm.apply(params, lm.init_state(params, 2), model.tokens, phase=0)[1])(model.params)


def _loop(params, tokens):
    """One row, chunk after chunk: gradients of all MLPs, of which each layer takes its own at its own time."""
    plain = skeleton(CONFIG)

    @jax.jit
    def gradient(mlp, carry, inputs, targets, taught):
        def loss(mlp):
            changed = {**params, "blocks": {**params["blocks"], "mlp": mlp}}
            after, out = plain.apply(changed, carry, inputs[None])
            log_p = jax.nn.log_softmax(out[0])[jnp.arange(inputs.shape[0]), targets]
            return -jnp.sum(jnp.where(taught, log_p, 0)), (after, out[0])

        return jax.grad(loss, has_aux=True)(mlp)

    mlp, carry, logits = params["blocks"]["mlp"], plain.init_state(params, 1), []
    sums = jax.tree.map(jnp.zeros_like, mlp)
    following = jnp.append(tokens[1:], 0), jnp.arange(LENGTH) < LENGTH - 1
    for begin in range(0, LENGTH, 2):
        chunk = slice(begin, min(begin + 2, LENGTH))
        errors, (carry, out) = gradient(mlp, carry, tokens[chunk], following[0][chunk], following[1][chunk])
        logits.append(out)
        sums = jax.tree.map(jnp.add, sums, errors)
        for layer, size in enumerate(SIZES):
            if size and chunk.stop % size == 0:
                for name in ("w_gate", "w_up", "w_down"):
                    mlp = {**mlp, name: mlp[name].at[layer].add(-ETA / size * sums[name][layer])}
                    sums = {**sums, name: sums[name].at[layer].set(0)}
    return jnp.concatenate(logits)


def test_levels_of_layers_equal_the_loop(x64, model):
    for row in range(2):
        expected = _loop(model.params, model.tokens[row])
        np.testing.assert_allclose(model.logits[row], expected, rtol=0, atol=1e-12)


def test_without_learning_the_logits_are_those_of_the_transformer(x64, model):
    """Bit for bit at learning rate 0; with steps that change no bit of a weight, up to the chunked attention."""
    trained = _logits(CONFIG, model)
    still = stack_levels((CONFIG, model.params), LEVELS, eta=0.0)
    np.testing.assert_array_equal(_logits(still.config, model), trained)
    tiny = stack_levels((CONFIG, model.params), LEVELS, eta=1e-30)
    np.testing.assert_allclose(_logits(tiny.config, model), trained, rtol=0, atol=1e-12)
    moved = np.abs(model.logits - trained).max(axis=(0, 2)) > 1e-6
    np.testing.assert_array_equal(moved, np.arange(LENGTH) >= 2)  # from the first write of the fastest level on


def test_nothing_is_copied_and_unnamed_layers_stay_ordinary(model):
    assert model.stacked.params is model.params
    assert stack_levels((CONFIG, model.params), {range(1, 3): 4}).config.mlp_chunks == (None, 4, 4, None)
    assert stack_levels((CONFIG, model.params), {}).config.fast_chunks == ()


def test_streaming_is_one_call_and_later_tokens_change_nothing_before_them(x64, model):
    step = jax.jit(lambda state, tokens: model.lm.apply(model.params, state, tokens))
    state = model.lm.init_state(model.params, 2)
    for t in range(LENGTH):
        state, part = step(state, model.tokens[:, t : t + 1])
        np.testing.assert_allclose(part[:, 0], model.logits[:, t], rtol=0, atol=1e-12)
    changed = model.forward(model.tokens.at[:, 6:].set(CONFIG.vocab_size - 1 - model.tokens[:, 6:]))
    np.testing.assert_array_equal(changed[:, :6], model.logits[:, :6])
    assert (np.abs(changed[:, 6:] - model.logits[:, 6:]).max(axis=-1) > 1e-3).all()


@pytest.mark.slow
def test_the_outer_gradient_reaches_the_start_of_every_level(x64, model):
    """Through the writes: along a direction it is the finite difference."""

    def loss(params):
        logits = model.lm.apply(params, model.lm.init_state(params, 2), model.tokens, phase=0)[1]
        return next_token_loss(logits, model.tokens)

    value, grads = jax.jit(loss), jax.jit(jax.grad(loss))(model.params)
    assert all(np.isfinite(leaf).all() and (leaf != 0).any() for leaf in jax.tree.leaves(grads))
    draws = np.random.default_rng(0)
    direction = jax.tree.map(lambda leaf: draws.normal(size=leaf.shape), grads["blocks"]["mlp"])

    def moved(h):
        mlp = jax.tree.map(lambda w, d: w + h * d, model.params["blocks"]["mlp"], direction)
        return float(value({**model.params, "blocks": {**model.params["blocks"], "mlp": mlp}}))

    h = 1e-4  # five-point stencil: truncation h^4, rounding 1e-16 / h
    difference = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
    pairs = zip(jax.tree.leaves(grads["blocks"]["mlp"]), jax.tree.leaves(direction), strict=True)
    np.testing.assert_allclose(sum(jnp.vdot(g, d) for g, d in pairs), difference, rtol=1e-6)


def test_stacked_levels_can_be_nested(x64, model):
    """The variants are those of any fast level: after 4 tokens the fast level starts again."""
    nested = dataclasses.replace(model.stacked.config, cms_variant="nested")
    difference = np.abs(_logits(nested, model) - model.logits).max(axis=(0, 2))
    np.testing.assert_array_equal(difference > 1e-6, np.arange(LENGTH) >= 4)


def test_what_cannot_be_stacked_is_refused(model):
    params = model.params
    with pytest.raises(ValueError, match="MLP of each layer of a transformer; got name='hope'"):
        stack_levels((ModelConfig(), {}), {0: 4})
    with pytest.raises(ValueError, match="there is no layer 4: the model has layers 0 to 3"):
        stack_levels((CONFIG, params), {range(2, 5): 4})
    with pytest.raises(ValueError, match="layer 1 is named twice"):
        stack_levels((CONFIG, params), {1: 4, (0, 1): 8})
    with pytest.raises(ValueError, match=r"chunk sizes must divide, .* got mlp_chunks=\[4, 6\]"):
        stack_levels((CONFIG, params), {0: 6, 1: 4})
    with pytest.raises(ValueError, match="cms_eta must not be negative; got -1"):
        stack_levels((CONFIG, params), {0: 4}, eta=-1)
