"""Attention, its rotary positions and its cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.models import ModelConfig, build_lm
from hope_jax.models.attention import Attention
from hope_jax.models.functional import functional
from hope_jax.models.rotary import rotate

CAPACITY = 8


@pytest.fixture(scope="module")
def attention():
    init, apply = functional(lambda rngs: Attention(8, 2, capacity=CAPACITY, theta=100.0, out_gain=1.0, rngs=rngs))
    params = init(jax.random.key(0))
    return params, apply, apply(params, 1, method="init_state")


def test_equals_the_sum_over_the_past(attention):
    """softmax(q k) v written out for each token and head, rotary angles included."""
    params, apply, cache = attention
    r = np.asarray(jax.random.normal(jax.random.key(1), (1, 5, 8)))
    _, y = apply(params, r, cache, phase=0, mask_BT=None)
    q, k, v = (np.asarray(r[0] @ params[name]).reshape(5, 2, 4) for name in ("wq", "wk", "wv"))
    out = np.zeros((5, 2, 4))
    for t in range(5):
        for h in range(2):
            scores = []
            for s in range(t + 1):
                angle = (t - s) / 100.0 ** (np.arange(2) / 2)
                a, b = q[t, h, :2] + 1j * q[t, h, 2:], k[s, h, :2] + 1j * k[s, h, 2:]
                scores.append(np.sum((a * np.exp(1j * angle) * b.conj()).real) / 2)
            weights = np.exp(scores) / np.sum(np.exp(scores))
            out[t, h] = weights @ v[: t + 1, h]
    np.testing.assert_allclose(y[0], out.reshape(5, 8) @ params["wo"], rtol=0, atol=1e-5)


def test_rotation_keeps_norms_and_depends_on_differences(x64):
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 6), jnp.float64)

    def score(at_q, at_k):
        return jnp.vdot(rotate(q, jnp.array([[at_q]]), 1e4), rotate(k, jnp.array([[at_k]]), 1e4))

    np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-12)
    assert abs(float(score(9, 4) - score(9, 5))) > 1e-3
    turned = rotate(q, jnp.array([[7]]), 1e4)
    np.testing.assert_allclose(jnp.vdot(turned, turned), jnp.vdot(q, q), rtol=1e-12)


def test_without_positions_the_order_of_the_past_does_not_matter():
    """With one layer the last output reads the earlier tokens as a set; with positions it does not."""
    tokens = jnp.array([[3, 1, 4, 5, 2]])
    shuffled = tokens[:, jnp.array([2, 0, 3, 1, 4])]

    def last_logits(theta, read):
        lm = build_lm(ModelConfig(name="transformer", vocab_size=8, dim=8, layers=1, heads=2, rope_theta=theta))
        params = lm.init(jax.random.key(0))
        return lm.apply(params, lm.init_state(params, 1), read, phase=0)[1][:, -1]

    np.testing.assert_allclose(last_logits(None, tokens), last_logits(None, shuffled), rtol=0, atol=1e-6)
    assert jnp.abs(last_logits(10.0, tokens) - last_logits(10.0, shuffled)).max() > 1e-4


@pytest.mark.parametrize(("length", "phase"), [(9, 0), (9, None), (4, 5)])
def test_overflow_that_is_known_is_refused(attention, length, phase):
    params, apply, cache = attention
    with pytest.raises(ValueError, match="9 tokens do not fit the attention cache of 8; raise max_length"):
        apply(params, jnp.ones((1, length, 8)), cache, phase=phase, mask_BT=None)


def test_overflow_that_is_found_too_late_is_nan_for_that_row_alone(attention):
    params, apply, _ = attention
    cache = apply(params, 2, method="init_state")._replace(position_B=jnp.array([7, 6]))
    r = jnp.ones((2, 2, 8))
    _, y = apply(params, r, cache, phase=None, mask_BT=None)
    assert np.isnan(y[0]).all() and np.isfinite(y[1]).all()


def test_a_wrong_phase_is_nan(attention):
    params, apply, cache = attention
    cache = cache._replace(position_B=jnp.array([3]))
    _, y = apply(params, jnp.ones((1, 2, 8)), cache, phase=0, mask_BT=None)
    assert np.isnan(y).all()


def test_a_fully_masked_row_is_finite_with_finite_gradients(attention):
    params, apply, cache = attention

    def total(r):
        return apply(params, r, cache, phase=0, mask_BT=jnp.zeros((1, 3), bool))[1].sum()

    value, grad = jax.value_and_grad(total)(jnp.ones((1, 3, 8)))
    assert value == 0 and (grad == 0).all()


def test_only_attention_pays_for_length():
    def size(name, max_length):
        lm = build_lm(ModelConfig(name=name, dim=16, heads=2, memory_hidden=8, max_length=max_length))
        state = jax.eval_shape(lambda: lm.init_state(lm.init(jax.random.key(0)), 1))
        return sum(leaf.size for leaf in jax.tree.leaves(state))

    assert size("transformer", 64) > 1.9 * size("transformer", 32)
    assert size("hope", 64) == size("hope", 32)
