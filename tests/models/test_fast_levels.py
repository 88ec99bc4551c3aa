"""Fast CMS levels against the definition, written as plain loops (spec 6.2, 6.3, 6.6)."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.models import ModelConfig, build_lm, check_sequence_length
from hope_jax.models.lm import skeleton
from tests.models.cases import next_token_loss

CONFIG = ModelConfig(
    name="hope_attention", vocab_size=12, dim=8, layers=1, heads=2, max_length=16,
    cms_hidden=(8, 8, 8), cms_chunks=(2, 4), cms_eta=0.5,
)  # fmt: skip
LENGTH = 11


@pytest.fixture(scope="module")
def model():
    """Functions compiled once, order-one float64 parameters, two rows of tokens and their parallel call."""
    with jax.enable_x64(True):
        lm = build_lm(CONFIG)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), jax.jit(lm.init)(jax.random.key(0)))
        params["embedding"] = 25 * params["embedding"]
        tokens = jax.random.randint(jax.random.key(1), (2, LENGTH), 0, CONFIG.vocab_size)
        forward = jax.jit(lambda mask: lm.apply(params, lm.init_state(params, 2), tokens, phase=0, mask_BT=mask))
        state, logits = forward(jnp.ones(tokens.shape, bool))
        return types.SimpleNamespace(
            lm=lm,
            params=params,
            tokens=tokens,
            forward=forward,
            step=jax.jit(lambda state, tokens: lm.apply(params, state, tokens)),
            gradient=_chunk_gradient(params),
            state=state,
            logits=logits,
        )


def _plain_logits(model, config):
    lm = build_lm(config)
    apply = jax.jit(lambda params: lm.apply(params, lm.init_state(params, 2), model.tokens, phase=0)[1])
    return apply(model.params)


def _put(params, level, weights):
    blocks = params["blocks"]
    name = f"level_{level}"
    cms = {**blocks["cms"], name: {**blocks["cms"][name], **weights}}
    return {**params, "blocks": {**blocks, "cms": cms}}


def _chunk_gradient(params):
    """Gradient of the summed next-token loss of one chunk with respect to the weights of every fast level."""
    plain = skeleton(CONFIG)

    def loss(weights, carry, inputs, targets, mask, taught):
        changed = params
        for i, new in enumerate(weights):
            changed = _put(changed, i, new)
        carry, out = plain.apply(changed, carry, inputs[None], mask_BT=mask[None])
        log_p = jax.nn.log_softmax(out[0])[jnp.arange(inputs.shape[0]), targets]
        return -jnp.sum(jnp.where(taught, log_p, 0)), (carry, out[0])

    return jax.jit(jax.grad(loss, has_aux=True))


def _loop(model, tokens, mask, meta=None):
    """One row: chunk after chunk, every level's errors summed in Python and written with plain SGD.

    With `meta` ("first_order" or "outer") the levels are nested, and start again when the next slower one has written.

    Returns the logits and the fast weights that the last token was read with.
    """
    sizes, fastest, length = CONFIG.cms_chunks, CONFIG.cms_chunks[0], len(tokens)
    cms = model.params["blocks"]["cms"]
    weights = [{k: cms[f"level_{i}"][k] for k in ("w1", "w2")} for i in range(len(sizes))]
    sums = jax.tree.map(jnp.zeros_like, weights)
    starts, start_sums = list(weights[:-1]), sums[:-1]
    carry, logits, used = skeleton(CONFIG).init_state(model.params, 1), [], weights
    following = jnp.append(tokens[1:], 0), mask & jnp.append(mask[1:], False)
    for begin in range(0, length, fastest):
        chunk = slice(begin, min(begin + fastest, length))
        used = list(weights)
        inputs = (tokens[chunk], following[0][chunk], mask[chunk], following[1][chunk])
        errors, (carry, out) = model.gradient(weights, carry, *inputs)
        logits.append(out)
        sums = jax.tree.map(jnp.add, sums, errors)
        for i, size in enumerate(sizes):
            if chunk.stop % size == 0:
                weights[i] = jax.tree.map(lambda w, e, c=size: w - CONFIG.cms_eta / c * e, weights[i], sums[i])
                sums[i] = jax.tree.map(jnp.zeros_like, sums[i])
        start_sums = jax.tree.map(jnp.add, start_sums, errors[:-1])
        for i, size in enumerate(sizes[1:] if meta else ()):
            if chunk.stop % size == 0:
                step = CONFIG.cms_eta / size if meta == "first_order" else 0.0
                starts[i] = jax.tree.map(lambda w, e, s=step: w - s * e, starts[i], start_sums[i])
                start_sums[i] = jax.tree.map(jnp.zeros_like, start_sums[i])
                weights[i] = starts[i]
    return jnp.concatenate(logits), used


@pytest.mark.parametrize("masked", [(), (1, 6)], ids=["all", "padding"])
def test_logits_and_weights_equal_the_loop(x64, model, masked):
    mask = jnp.ones(model.tokens.shape, bool).at[0, jnp.array(masked, int)].set(False)
    state, logits = model.forward(mask)
    for row in range(2):
        expected, used = _loop(model, model.tokens[row], mask[row])
        np.testing.assert_allclose(logits[row][mask[row]], expected[mask[row]], rtol=0, atol=1e-12)
        for i, weights in enumerate(used):
            for name, value in weights.items():
                np.testing.assert_allclose(state.nest.levels[i].start[name][row], value, rtol=0, atol=1e-12)
    start = model.params["blocks"]["cms"]["level_1"]["w1"]
    assert float(jnp.abs(state.nest.levels[1].start["w1"] - start[None]).max()) > 1e-3  # it did learn


@pytest.mark.parametrize("meta", ["first_order", pytest.param("outer", marks=pytest.mark.slow)])
def test_nested_levels_equal_the_loop(x64, model, meta):
    """Levels that start again, also decoded token by token; each row's start states lie between its levels."""
    lm = build_lm(dataclasses.replace(CONFIG, cms_variant="nested", cms_meta=meta))
    fresh = lm.init_state(model.params, 2)
    state, logits = jax.jit(lambda: lm.apply(model.params, fresh, model.tokens, phase=0))()
    mask = jnp.ones(LENGTH, bool)
    for row in range(2):
        expected, used = _loop(model, model.tokens[row], mask, meta)
        np.testing.assert_allclose(logits[row], expected, rtol=0, atol=1e-12)
        for i, weights in enumerate(used):
            for name, value in weights.items():
                np.testing.assert_allclose(state.nest.levels[2 * i].start[name][row], value, rtol=0, atol=1e-12)
    assert float(jnp.abs(logits - model.logits).max()) > 1e-3  # not the chain that goes on
    step = jax.jit(lambda state, tokens: lm.apply(model.params, state, tokens))
    decoded = fresh
    for t in range(LENGTH):
        decoded, part = step(decoded, model.tokens[:, t : t + 1])
        np.testing.assert_allclose(part[:, 0], logits[:, t], rtol=0, atol=1e-12)


def test_decoding_is_the_parallel_pass(x64, model):
    state, parts = model.lm.init_state(model.params, 2), []
    for t in range(LENGTH):
        state, part = model.step(state, model.tokens[:, t : t + 1])
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), model.logits, rtol=0, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), state, model.state)


def test_rows_at_different_places_write_at_their_own_time(x64, model):
    """After a reset of one row the clocks differ; each row still equals its own parallel pass."""
    state = model.lm.init_state(model.params, 2)
    for t in range(3):
        state, _ = model.step(state, model.tokens[:, t : t + 1])
    state = model.lm.reset(model.params, state, jnp.array([False, True]))
    for t in range(6):
        token = jnp.stack([model.tokens[0, 3 + t], model.tokens[1, t]])[:, None]
        state, out = model.step(state, token)
        np.testing.assert_allclose(out[0, 0], model.logits[0, 3 + t], rtol=0, atol=1e-12)
        np.testing.assert_allclose(out[1, 0], model.logits[1, t], rtol=0, atol=1e-12)


def test_no_step_is_the_plain_chain_and_a_step_acts_from_the_next_chunk_on(x64, model):
    plain = _plain_logits(model, dataclasses.replace(CONFIG, cms_chunks=()))
    still = _plain_logits(model, dataclasses.replace(CONFIG, cms_eta=0.0))
    np.testing.assert_array_equal(still, plain)
    still = _plain_logits(model, dataclasses.replace(CONFIG, cms_eta=1e-30))  # writes that change no bit of a weight
    np.testing.assert_allclose(still, plain, rtol=0, atol=1e-13)
    moved = np.abs(model.logits - plain).max(axis=(0, 2)) > 1e-6
    np.testing.assert_array_equal(moved, np.arange(LENGTH) >= CONFIG.cms_chunks[0])


@pytest.mark.slow
def test_chunks_that_cut_the_memories_chunks(x64):
    """A fast level of 3 tokens around memories of 2 and 4: the model's clock is not known inside the nest."""
    config = dataclasses.replace(
        CONFIG, name="hope", memory_hidden=4, chunk_proj=2, chunk_mem=4, cms_hidden=(8, 8), cms_chunks=(3,)
    )
    lm = build_lm(config)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), lm.init(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (1, LENGTH), 0, config.vocab_size)
    _, logits = jax.jit(lambda: lm.apply(params, lm.init_state(params, 1), tokens, phase=0))()
    step = jax.jit(lambda state, tokens: lm.apply(params, state, tokens))
    state = lm.init_state(params, 1)
    for t in range(LENGTH):
        state, part = step(state, tokens[:, t : t + 1])
        np.testing.assert_allclose(part[:, 0], logits[:, t], rtol=0, atol=1e-12)


def _outer(config, tokens):
    lm, tokens = build_lm(config), tokens[:, :9]
    return lambda params: next_token_loss(lm.apply(params, lm.init_state(params, 2), tokens, phase=0)[1], tokens)


@pytest.mark.slow
def test_outer_gradient_equals_finite_differences(x64, model):
    params, tokens = model.params, model.tokens
    loss = jax.jit(_outer(CONFIG, tokens))
    grads = jax.jit(jax.grad(loss))(params)
    keys = iter(jax.random.split(jax.random.key(3), 64))
    direction = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), params)

    def moved(h):
        return float(loss(jax.tree.map(lambda w, d: w + h * d, params, direction)))

    h = 1e-4  # five-point stencil: truncation h^4, rounding 1e-16 / h
    difference = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
    along = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
    np.testing.assert_allclose(along, difference, rtol=1e-6)


@pytest.mark.slow
def test_truncation_of_the_outer_gradient(x64, model):
    params, tokens = model.params, model.tokens

    def start_gradient(bptt_chunks):
        config = dataclasses.replace(CONFIG, bptt_chunks=bptt_chunks)
        grads = jax.jit(jax.grad(_outer(config, tokens)))(params)
        return grads["blocks"]["cms"]["level_0"]["w1"]

    full, long, short = start_gradient(()), start_gradient((100, None)), start_gradient((1, 1))
    np.testing.assert_allclose(long, full, rtol=0, atol=1e-13)
    assert float(jnp.abs(short - full).max()) > 1e-4
    assert float(jnp.abs(short).max()) > 1e-4


def test_sizes_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match=r"chunk sizes must divide, fastest first; got .*\[4, 6\]"):
        build_lm(dataclasses.replace(CONFIG, cms_chunks=(4, 6)))
    slowest = max(CONFIG.cms_chunks)
    with pytest.raises(
        ValueError, match=f"sequences of {slowest} tokens never read what the CMS level with chunk {slowest}"
    ):
        check_sequence_length(CONFIG, slowest)
    check_sequence_length(CONFIG, slowest + 1)
    memories = ModelConfig(name="hope", chunk_proj=4, chunk_mem=16)
    with pytest.raises(ValueError, match="sequences of 16 tokens never read what a memory with chunk 16"):
        check_sequence_length(memories, 16)
    check_sequence_length(memories, 17)
