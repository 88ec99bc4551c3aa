"""Sliding-window attention against a plain loop over tokens, and what its state keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.models.functional import functional
from hope_jax.models.window_attention import WindowAttention
from tests.models import loops
from tests.oracles import assert_close, compiled, float64, numpy64

B, T, D, H, W, P = 2, 11, 8, 2, 4, 3  # W does not divide T
K = D // H


def module(persistent=0):
    return functional(lambda rngs: WindowAttention(D, H, window=W, theta=100.0, persistent=persistent, rngs=rngs))


def test_a_decoded_token_meets_its_window_alone():
    """One query against W + 1 keys, not a block of W against 2 W."""
    init, apply = module()
    params = jax.eval_shape(init, jax.random.key(0))
    state = jax.eval_shape(lambda p: apply(p, B, method="init_state"), params)
    token = jax.ShapeDtypeStruct((B, 1, D), jnp.float32)
    text = str(jax.make_jaxpr(lambda p, r, s: apply(p, r, s, phase=None, mask_BT=None))(params, token, state))
    assert f"f32[{B},1,{H},1,{W + 1}]" in text and f"{W},{2 * W}]" not in text


@pytest.mark.parametrize("persistent", [0, P])
def test_the_loop_and_any_cut(persistent, x64, rng):
    init, apply = module(persistent)
    params = float64(init(jax.random.key(0)))
    r = rng.normal(size=(B, T, D))
    mask = np.ones((B, T), bool)
    mask[1, [2, 5, 6]] = False

    def run(params, r, cuts):
        state, parts = apply(params, B, method="init_state"), []
        for a, b in zip((0, *cuts), (*cuts, T), strict=True):
            state, y = apply(params, r[:, a:b], state, phase=None, mask_BT=jnp.asarray(mask[:, a:b]))
            parts.append(y)
        return state, jnp.concatenate(parts, axis=1)

    whole, y = compiled(lambda p, r: run(p, r, ()))(params, r)
    for row in range(B):
        want = loops.attention(numpy64(params), r[row], H, W, 100.0, mask[row])
        assert_close(y[row][mask[row]], want[mask[row]])
    parts, y_parts = compiled(lambda p, r: run(p, r, (1, 3, 8)))(params, r)
    assert_close(y_parts, y)
    assert_close(parts, whole)
    assert {leaf.shape[1] for leaf in whole[:3]} == {W}
