"""Modules as pure functions over plain dicts."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from hope_jax.models import functional


class Affine(nnx.Module):
    def __init__(self, *, rngs):
        self.inner = nnx.Linear(3, 2, use_bias=False, rngs=rngs)
        self.shift = nnx.Param(jnp.ones(2))

    def __call__(self, x):
        return self.inner(x) + self.shift[...][None]

    def twice(self, x, *, times):
        return times * self(x)


def test_params_are_plain_dicts_and_gradients_have_their_shape():
    init, apply = functional(lambda rngs: Affine(rngs=rngs))
    params = jax.jit(init)(jax.random.key(0))
    assert {type(node) for node in (params, params["inner"])} == {dict}
    assert jax.tree.map(jnp.shape, params) == {"inner": {"kernel": (3, 2)}, "shift": (2,)}
    grads = jax.grad(lambda p: apply(p, jnp.ones((1, 3)), method="twice", times=2.0).sum())(params)
    assert grads["shift"].tolist() == [2.0, 2.0]


def test_init_is_a_function_of_the_key_and_stacks_under_vmap():
    init, apply = functional(lambda rngs: Affine(rngs=rngs))
    keys = jax.random.split(jax.random.key(0), 2)
    stacked = jax.vmap(init)(keys)
    for i, key in enumerate(keys):
        assert jnp.array_equal(stacked["inner"]["kernel"][i], init(key)["inner"]["kernel"])
    assert not jnp.array_equal(stacked["inner"]["kernel"][0], stacked["inner"]["kernel"][1])
    assert jax.vmap(apply, in_axes=(0, None))(stacked, jnp.ones((1, 3))).shape == (2, 1, 2)


def test_a_module_with_other_state_is_refused():
    with pytest.raises(TypeError, match=r"only nnx.Param may live in a module; got other variables at .*mean"):
        functional(lambda rngs: nnx.BatchNorm(2, rngs=rngs))
