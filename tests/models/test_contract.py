"""What every language model promises, one table of claims over one table of models."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.models import build_lm
from tests.models.cases import CASES, LENGTH, VOCAB, distinct_tokens, next_token_loss

TOLERANCE = 1e-5  # float32, order-one logits
# Muon multiplies the rounding of directions that a gradient lacks by 3.4445 in each of five steps, then steps by the
# sum of a chunk's eta, 4 * 0.1; the sequence has four whole chunks.
TOLERANCES = {"atlas": 4 * (4 * 0.1) * 3.4445**5 * float(np.finfo(np.float32).eps)}  # 9e-5


# Two clocks in a layer, and gradients through the gradients of a whole model, compile for a while.
QUICK = ("transformer", "hope_attention", "hope")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    """One model with its parameters, compiled once per shape, and the logits of one parallel call."""
    config = CASES[request.param]
    lm = build_lm(config)
    params = _wake(jax.jit(lm.init)(jax.random.key(0)))
    apply = jax.jit(lm.apply, static_argnames="phase")
    tokens = distinct_tokens()
    fresh = lm.init_state(params, 2)
    state, logits = apply(params, fresh, tokens, phase=0)
    return types.SimpleNamespace(
        name=request.param, config=config, lm=lm, params=params, apply=apply, tokens=tokens, fresh=fresh,
        state=state, logits=logits,
    )  # fmt: skip


def _wake(params):
    """Embeddings of unit scale: logits of order one, so that absolute tolerances mean something."""
    return {**params, "embedding": 25 * params["embedding"]}


def test_logits_have_order_one(case):
    assert case.logits.shape == (2, LENGTH, VOCAB)
    assert 0.3 < float(jnp.std(case.logits)) < 3


def test_causal_and_the_first_token_reaches_the_last_output(case):
    """d logits_t / d embedding of token s, for all t and s: exactly zero above the diagonal."""
    lm = build_lm(dataclasses.replace(case.config, tie_embeddings=False))  # or the loss reads every token's row
    params = {**case.params, "head": jax.random.normal(jax.random.key(2), (16, VOCAB))}
    tokens = case.tokens[:1]

    def outputs(embedding):
        changed = {**params, "embedding": embedding}
        _, logits = lm.apply(changed, lm.init_state(changed, 1), tokens, phase=0)
        return logits[0] @ jnp.arange(VOCAB, dtype=jnp.float32)

    jacobian = jax.jit(jax.jacrev(outputs))(params["embedding"])[:, tokens[0]]  # [T out, T in, D]
    influence = np.abs(np.asarray(jacobian)).max(axis=-1)
    assert (np.triu(influence, 1) == 0).all()
    assert (np.diag(influence) > 0).all()
    assert influence[-1, 0] > 0


def test_later_tokens_change_no_earlier_logit(case):
    """Also through what a gradient does not see: targets of fast levels."""
    at = 8
    changed = case.tokens.at[:, at:].set(VOCAB - 1 - case.tokens[:, at:])
    _, logits = case.apply(case.params, case.fresh, changed, phase=0)
    np.testing.assert_array_equal(logits[:, :at], case.logits[:, :at])
    assert (np.abs(logits[:, at:] - case.logits[:, at:]).max(axis=-1) > 1e-3).all()


def test_every_parameter_learns_and_the_first_loss_is_log_vocabulary(case):
    params = jax.jit(case.lm.init)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, LENGTH), 0, VOCAB)

    def loss(params):
        _, logits = case.lm.apply(params, case.lm.init_state(params, 2), tokens, phase=0)
        return next_token_loss(logits, tokens)

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert abs(float(value) - np.log(VOCAB)) < 0.1 * np.log(VOCAB)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(grad).all(), name
        per_layer = np.abs(grad).reshape(grad.shape[0], -1).max(axis=1) if "blocks" in name else np.abs(grad).max()
        assert (per_layer > 0).all(), name


@pytest.mark.parametrize("cut", [5, pytest.param(12, marks=pytest.mark.slow)])
def test_one_call_is_any_split_with_the_phase_known(case, cut):
    state, head = case.apply(case.params, case.fresh, case.tokens[:, :cut], phase=0)
    state, tail = case.apply(case.params, state, case.tokens[:, cut:], phase=cut)
    _close(case, jnp.concatenate([head, tail], axis=1), case.logits)
    _close_states(case, state, case.state)


def test_decoding_token_by_token_is_the_parallel_pass(case):
    state, parts = case.fresh, []
    for t in range(LENGTH):
        state, logits = case.apply(case.params, state, case.tokens[:, t : t + 1])
        parts.append(logits)
    _close(case, jnp.concatenate(parts, axis=1), case.logits)
    _close_states(case, state, case.state)


def test_a_prompt_that_ends_inside_a_chunk_goes_on_with_the_phase_unknown(case):
    state, head = case.apply(case.params, case.fresh, case.tokens[:, :5], phase=0)
    _, tail = case.apply(case.params, state, case.tokens[:, 5:])
    _close(case, jnp.concatenate([head, tail], axis=1), case.logits)


def test_rows_share_nothing(case):
    changed = case.tokens.at[0].set(case.tokens[0, ::-1])
    _, logits = case.apply(case.params, case.fresh, changed, phase=0)
    np.testing.assert_array_equal(logits[1], case.logits[1])
    assert not np.array_equal(logits[0], case.logits[0])


def test_padding_is_neither_seen_nor_remembered(case):
    hidden = jnp.zeros(LENGTH, bool).at[jnp.array([0, 5, 6, 7, 16])].set(True)
    mask = jnp.stack([~hidden, jnp.ones(LENGTH, bool)])
    outcomes = [
        case.apply(case.params, case.fresh, jnp.where(mask, case.tokens, pad), phase=0, mask_BT=mask)[1]
        for pad in (0, VOCAB - 1)
    ]
    np.testing.assert_array_equal(outcomes[0][mask], outcomes[1][mask])
    _close(case, outcomes[0][1], case.logits[1])  # the unpadded row
    assert float(jnp.abs(outcomes[0][0, 8] - case.logits[0, 8]).max()) > 1e-3


def test_padding_at_the_end_changes_nothing_before_it(case):
    mask = jnp.arange(LENGTH)[None] < jnp.array([[11], [LENGTH]])
    _, logits = case.apply(case.params, case.fresh, case.tokens, phase=0, mask_BT=mask)
    _close(case, logits[mask], case.logits[mask])


def test_reset_rows_start_again_and_others_go_on(case):
    state, _ = case.apply(case.params, case.fresh, case.tokens[:, :5], phase=0)
    state = case.lm.reset(case.params, state, jnp.array([True, False]))
    parts = []
    for t in range(6):
        token = jnp.stack([case.tokens[0, t], case.tokens[1, 5 + t]])[:, None]
        state, logits = case.apply(case.params, state, token)
        parts.append(logits)
    logits = jnp.concatenate(parts, axis=1)
    _close(case, logits[0], case.logits[0, :6])
    _close(case, logits[1], case.logits[1, 5:11])


def test_state_keeps_its_shape_its_batch_axis_and_one_program(case):
    def shapes(state):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)

    assert shapes(case.state) == shapes(case.fresh)
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(case.state))
    traces = []

    @jax.jit
    def step(params, state, tokens):
        traces.append(1)
        return case.lm.apply(params, state, tokens)

    state, _ = step(case.params, case.fresh, case.tokens[:, :1])
    for t in (1, 2):
        state, _ = step(case.params, state, case.tokens[:, t : t + 1])
    assert traces == [1]


def test_bfloat16_computes_narrow_and_keeps_wide(case):
    lm = build_lm(dataclasses.replace(case.config, dtype="bfloat16"))
    state, logits = jax.jit(lm.apply, static_argnames="phase")(
        case.params, lm.init_state(case.params, 2), case.tokens, phase=0
    )
    floats = [leaf for leaf in jax.tree.leaves((state, logits)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    # Eight bits of mantissa over the residual branches of two layers; never equal, or nothing was narrow.
    error = float(jnp.sqrt(jnp.mean((logits - case.logits) ** 2)) / jnp.std(case.logits))
    assert 1e-4 < error < 2**-8 * 12


@pytest.mark.slow
def test_recomputing_changes_no_number(case):
    """Loss and gradients with remat "full" are those without."""

    def value_and_grad(remat):
        lm = build_lm(dataclasses.replace(case.config, remat=remat))

        def loss(params):
            return next_token_loss(lm.apply(params, lm.init_state(params, 2), case.tokens, phase=0)[1], case.tokens)

        return jax.jit(jax.value_and_grad(loss))(case.params)

    def relative(a, b):
        return float(jnp.linalg.norm(a - b) / (jnp.linalg.norm(b) + 1e-12))

    errors = jax.tree.map(relative, value_and_grad("full"), value_and_grad("none"))
    assert max(jax.tree.leaves(errors)) < 1e-4  # gradients are sums over tokens and layers, in another order


@pytest.mark.slow
def test_thirty_steps_lower_the_loss(case):
    """Adam on one batch; a model that cannot be trained stays at log(vocabulary)."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))

    def loss(params):
        _, logits = case.lm.apply(params, case.lm.init_state(params, 2), case.tokens, phase=0)
        return next_token_loss(logits, case.tokens)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, tx.init(params)), length=30)[1]

    losses = train(jax.jit(case.lm.init)(jax.random.key(0)))
    assert np.isfinite(losses).all()
    assert float(losses[-1]) < 0.8 * float(losses[0])


def _close(case, actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCES.get(case.name, TOLERANCE))


def _close_states(case, actual, expected):
    jax.tree.map(lambda a, b: _close(case, a, b), actual, expected)
