"""A whole call of `oja`, two kernel calls, is the level that takes its error token by token."""

import jax
import jax.numpy as jnp
import pytest

from hope_jax import Tokens, dgd, level, linear_memory, nest, oja
from hope_jax.local import local_output
from hope_jax.oja import oja_error
from tests.oracles import assert_close, compiled

K, V, T, H = 3, 2, 6, 2


def test_the_fast_path_is_the_definition(x64, rng):
    """Reads, last weights and every gradient; heads, a masked token that holds anything, start weights of any size."""
    slow_level = level(linear_memory(K, V), dgd(exact=False, decay=False), 1, read="after")
    slow = nest(slow_level, error=oja_error, output=local_output)
    key, query = rng.normal(size=(2, T, H, K))
    value = rng.normal(size=(T, H, V)) * 0.7
    value[2] *= 1e3
    eta, alpha = rng.uniform(0.1, 0.6, (T, H)), rng.uniform(0.6, 1.0, (T, H))
    start, at_y, at_s = rng.normal(size=(H, K, V)), rng.normal(size=(T, H, V)), rng.normal(size=(H, K, V))

    def outcome(n):
        def loss(start, key, value, query, eta, alpha):
            xs = Tokens(key, value, query, eta, alpha, mask=jnp.arange(T) != 2)
            state, y = n.apply(n.init(({"w": start},)), xs)
            end = state.levels[0].running["w"]
            return jnp.sum(y * at_y) + jnp.sum(end * at_s), (y, end)

        grad = jax.value_and_grad(loss, argnums=range(6), has_aux=True)
        return compiled(grad)(start, key, value, query, eta, alpha)

    assert_close(outcome(oja(K, V)), outcome(slow), 1e-11)


def test_without_a_query_only_the_state_moves(x64, rng):
    n, key, value = oja(K, V), rng.normal(size=(T, K)), rng.normal(size=(T, V))
    start = ({"w": rng.normal(size=(K, V))},)
    apply = compiled(lambda p, xs: n.apply(n.init(p), xs))
    xs = Tokens(key, value, key, eta=jnp.full(T, 0.2))
    state, y = apply(start, xs._replace(query=None))
    assert y is None
    assert_close(state, apply(start, xs)[0])


def test_a_missing_step_is_named():
    n, x = oja(K, V), jnp.ones((T, K))
    with pytest.raises(ValueError, match=r"oja needs the gate eta; the Tokens have \['alpha'\]"):
        n.apply(n.init(n.params(jax.random.key(0))), Tokens(x, x[:, :V], x, alpha=x[:, 0]))
