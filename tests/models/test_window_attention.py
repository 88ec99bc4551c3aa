"""Sliding-window attention against a plain loop over tokens, and what its state keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.models.functional import functional
from hope_jax.models.rotary import rotate
from hope_jax.models.window_attention import WindowAttention
from tests.oracles import assert_close, compiled, float64, numpy64

B, T, D, H, W, P = 2, 11, 8, 2, 4, 3  # W does not divide T
K = D // H


def module(persistent=0):
    return functional(lambda rngs: WindowAttention(D, H, window=W, theta=100.0, persistent=persistent, rngs=rngs))


def loop(params, r, mask):
    """One row, one token and one head at a time; keys are looked up, not masked."""
    turn = lambda x, t: np.asarray(rotate(jnp.asarray(x)[None, None], jnp.full((1, 1), t), 100.0))[0, 0]  # noqa: E731
    heads = lambda x: x.reshape(*x.shape[:-1], H, K)  # noqa: E731
    persistent = params.get("persistent_PD", np.zeros((0, D)))
    ys = []
    for t in range(T):
        q = heads(r[t] @ params["wq"])
        past = [s for s in range(max(0, t - W + 1), t + 1) if mask[s]]
        y = []
        for h in range(H):
            scores = [turn(q, t)[h] @ turn(heads(r[s] @ params["wk"]), s)[h] for s in past]
            scores += [q[h] @ heads(p @ params["wk"])[h] for p in persistent]
            values = [heads(r[s] @ params["wv"])[h] for s in past] + [heads(p @ params["wv"])[h] for p in persistent]
            weight = np.exp(np.array(scores) / np.sqrt(K))
            y.append(weight / weight.sum() @ np.stack(values))
        ys.append(np.concatenate(y) @ params["wo"])
    return np.stack(ys)


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
        want = loop(numpy64(params), r[row], mask[row])
        assert_close(y[row][mask[row]], want[mask[row]])
    parts, y_parts = compiled(lambda p, r: run(p, r, (1, 3, 8)))(params, r)
    assert_close(y_parts, y)
    assert_close(parts, whole)
    assert {leaf.shape[1] for leaf in whole[:3]} == {W}
