"""Fast CMS levels against the definition, written as plain loops (spec 6.2, 6.3, 6.6)."""

import dataclasses

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


def _model(config, dtype=jnp.float64):
    """Functions, order-one parameters and two rows of tokens."""
    lm = build_lm(config)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), jax.jit(lm.init)(jax.random.key(0)))
    params["embedding"] = 25 * params["embedding"]
    return lm, params, jax.random.randint(jax.random.key(1), (2, LENGTH), 0, config.vocab_size)


def _forward(lm, params, tokens, mask=None, phase=0):
    apply = jax.jit(lm.apply, static_argnames="phase")
    return apply(params, lm.init_state(params, tokens.shape[0]), tokens, phase=phase, mask_BT=mask)


def _put(params, level, weights):
    blocks = params["blocks"]
    name = f"level_{level}"
    cms = {**blocks["cms"], name: {**blocks["cms"][name], **weights}}
    return {**params, "blocks": {**blocks, "cms": cms}}


def _oracle(config, params, tokens, mask):
    """One row: chunk after chunk, every level's errors summed in Python and written with plain SGD.

    Returns the logits and, per token, the fast weights it was read with.
    """
    model = skeleton(dataclasses.replace(config, cms_chunks=()))
    sizes, fastest = config.cms_chunks, config.cms_chunks[0]
    weights = [{k: params["blocks"]["cms"][f"level_{i}"][k] for k in ("w1", "w2")} for i in range(len(sizes))]
    sums = jax.tree.map(jnp.zeros_like, weights)
    carry, logits, used = model.init_state(params, 1), [], []

    @jax.jit
    def chunk_loss(weights, carry, inputs, targets, mask, taught):
        changed = params
        for i, new in enumerate(weights):
            changed = _put(changed, i, new)
        carry, out = model.apply(changed, carry, inputs[None], mask_BT=mask[None])
        log_p = jax.nn.log_softmax(out[0])[jnp.arange(inputs.shape[0]), targets]
        return -jnp.sum(jnp.where(taught, log_p, 0)), (carry, out[0])

    gradient = jax.jit(jax.grad(chunk_loss, has_aux=True))
    for begin in range(0, len(tokens), fastest):
        end = min(begin + fastest, len(tokens))
        used += [weights] * (end - begin)
        last = end + 1 > len(tokens)
        targets = jnp.append(tokens[begin + 1 : end + 1], jnp.zeros(int(last), int))
        taught = mask[begin:end] & jnp.append(mask[begin + 1 : end + 1], jnp.zeros(int(last), bool))
        errors, (carry, out) = gradient(weights, carry, tokens[begin:end], targets, mask[begin:end], taught)
        logits.append(out)
        sums = jax.tree.map(jnp.add, sums, errors)
        for i, size in enumerate(sizes):
            if end % size == 0:
                step = config.cms_eta / size
                weights = [*weights]
                weights[i] = jax.tree.map(lambda w, e, step=step: w - step * e, weights[i], sums[i])
                sums = [*sums]
                sums[i] = jax.tree.map(jnp.zeros_like, sums[i])
    return jnp.concatenate(logits), used


@pytest.mark.parametrize("masked", [(), (1, 6)], ids=["all", "padding"])
def test_logits_and_weights_equal_the_loop(x64, masked):
    lm, params, tokens = _model(CONFIG)
    mask = jnp.ones(tokens.shape, bool).at[0, jnp.array(masked, int)].set(False)
    state, logits = _forward(lm, params, tokens, mask)
    for row in range(2):
        expected, used = _oracle(CONFIG, params, tokens[row], mask[row])
        np.testing.assert_allclose(logits[row][mask[row]], expected[mask[row]], rtol=0, atol=1e-12)
        for i, weights in enumerate(used[-1]):  # what the last token was read with
            for name, value in weights.items():
                np.testing.assert_allclose(state.nest.levels[i].start[name][row], value, rtol=0, atol=1e-12)
    start = params["blocks"]["cms"]["level_1"]["w1"]
    assert float(jnp.abs(state.nest.levels[1].start["w1"] - start[None]).max()) > 1e-3  # it did learn


def test_decoding_is_the_parallel_pass(x64):
    lm, params, tokens = _model(CONFIG)
    state, logits = _forward(lm, params, tokens)
    step = jax.jit(lm.apply)
    streamed, parts = lm.init_state(params, 2), []
    for t in range(LENGTH):
        streamed, part = step(params, streamed, tokens[:, t : t + 1])
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), logits, rtol=0, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), streamed, state)


def test_rows_at_different_places_write_at_their_own_time(x64):
    """After a reset of one row the clocks differ; each row still equals its own parallel pass."""
    lm, params, tokens = _model(CONFIG)
    _, logits = _forward(lm, params, tokens)
    state, _ = jax.jit(lambda p, s, t: lm.apply(p, s, t, phase=0))(params, lm.init_state(params, 2), tokens[:, :3])
    state = lm.reset(params, state, jnp.array([False, True]))
    step = jax.jit(lm.apply)
    for t in range(6):
        token = jnp.stack([tokens[0, 3 + t], tokens[1, t]])[:, None]
        state, out = step(params, state, token)
        np.testing.assert_allclose(out[0, 0], logits[0, 3 + t], rtol=0, atol=1e-12)
        np.testing.assert_allclose(out[1, 0], logits[1, t], rtol=0, atol=1e-12)


def test_no_step_is_the_plain_chain(x64):
    lm, params, tokens = _model(dataclasses.replace(CONFIG, cms_eta=0.0))
    _, logits = _forward(lm, params, tokens)
    _, plain = _forward(build_lm(dataclasses.replace(CONFIG, cms_chunks=())), params, tokens)
    np.testing.assert_allclose(logits, plain, rtol=0, atol=1e-13)


def test_writes_reach_the_next_chunk_and_no_earlier_token(x64):
    lm, params, tokens = _model(CONFIG)
    _, logits = _forward(lm, params, tokens)
    _, plain = _forward(build_lm(dataclasses.replace(CONFIG, cms_chunks=())), params, tokens)
    moved = np.abs(logits - plain).max(axis=(0, 2)) > 1e-6
    np.testing.assert_array_equal(moved, np.arange(LENGTH) >= CONFIG.cms_chunks[0])


def _outer(config, tokens):
    lm = build_lm(config)
    return lambda params: next_token_loss(lm.apply(params, lm.init_state(params, 2), tokens, phase=0)[1], tokens)


@pytest.mark.slow
def test_outer_gradient_equals_finite_differences(x64):
    _, params, tokens = _model(CONFIG)
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
def test_truncation_of_the_outer_gradient(x64):
    _, params, tokens = _model(CONFIG)

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
    with pytest.raises(ValueError, match="sequences of 3 tokens never write the CMS level with chunk 4"):
        check_sequence_length(CONFIG, 3)
    check_sequence_length(CONFIG, 4)
