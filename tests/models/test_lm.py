"""The skeleton: recomputation, tied heads, refused calls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.models import build_lm
from tests.models.cases import CASES, distinct_tokens, next_token_loss


@pytest.mark.parametrize(
    "name",
    ["transformer", *(pytest.param(n, marks=pytest.mark.slow) for n in ("hope_attention", "hope", "hope_fast"))],
)
def test_recomputation_changes_no_number(name):
    tokens = distinct_tokens()
    params = jax.jit(build_lm(CASES[name]).init)(jax.random.key(0))

    def outcome(policy):
        lm = build_lm(dataclasses.replace(CASES[name], remat=policy))

        def loss(params):
            return next_token_loss(lm.apply(params, lm.init_state(params, 2), tokens, phase=0)[1], tokens)

        return jax.jit(jax.value_and_grad(loss))(params)

    expected = outcome("none")
    for policy in ("full", "dots"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), outcome(policy), expected)


def test_a_full_policy_recomputes_the_blocks():
    def program(policy):
        lm = build_lm(dataclasses.replace(CASES["transformer"], remat=policy))
        params = lm.init(jax.random.key(0))
        tokens = distinct_tokens()
        loss = lambda p: lm.apply(p, lm.init_state(p, 2), tokens, phase=0)[1].sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(params))

    products = {policy: program(policy).count("dot_general") for policy in ("none", "dots", "full")}
    assert products["none"] <= products["dots"] < products["full"]


def test_the_untied_head_is_a_parameter_of_its_own():
    tied, untied = (
        build_lm(dataclasses.replace(CASES["transformer"], tie_embeddings=tie)).init(jax.random.key(0))
        for tie in (True, False)
    )
    assert set(untied) - set(tied) == {"head"}
    assert untied["head"].shape == tied["embedding"].T.shape


def test_parameters_are_float32_and_stacked_by_layer():
    params = build_lm(CASES["transformer"]).init(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params["blocks"])} == {CASES["transformer"].layers}
    first, second = params["blocks"]["mixer"]["wq"]
    assert not np.array_equal(first, second)


def test_calls_that_cannot_be_meant_are_refused():
    lm = build_lm(CASES["transformer"])
    params = lm.init(jax.random.key(0))
    state, tokens = lm.init_state(params, 2), distinct_tokens()
    with pytest.raises(TypeError, match=r"tokens must be integers of shape \[batch, time\]; got int32\[17\]"):
        lm.apply(params, state, tokens[0])
    with pytest.raises(TypeError, match=r"tokens must be integers .* got float32"):
        lm.apply(params, state, tokens.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"tokens have 1 rows, the state has \[2\]; make it with init_state"):
        lm.apply(params, state, tokens[:1])
    with pytest.raises(TypeError, match="mask must be bool of shape"):
        lm.apply(params, state, tokens, mask_BT=jnp.ones((2, 3), bool))
    with pytest.raises(TypeError, match="phase must be None or a Python integer"):
        lm.apply(params, state, tokens, phase=jnp.int32(0))
