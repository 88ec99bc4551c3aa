"""What a nest refuses, what it masks, and where it cuts the outer gradient of a rule's state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax import Outer, Tokens, Write, cms_memory, dgd, l2_regression, level, linear_memory, nest
from hope_jax.factors import factored_vjp

LINEAR = linear_memory(3, 3, init_scale=1.0)
X = jax.random.normal(jax.random.key(0), (8, 3))


def outer_error(params, carry, chunk):
    """A global error that hands its mask on."""
    x, mask = chunk
    return (Write({"w": Outer(x, x)}, mask=mask),), carry, x


def test_masked_tokens_of_a_global_level_are_not_written():
    n = nest(level(LINEAR, optax.sgd(1.0), 4), error=outer_error)
    start = n.init(n.params(jax.random.key(1)))
    mask = jnp.arange(8) % 2 == 0
    state, _ = n.apply(start, (X, mask))
    want = start.levels[0].start["w"] - jnp.einsum("TK,TV->KV", X[::2], X[::2])
    np.testing.assert_allclose(state.levels[0].start["w"], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (Write({"w": jnp.ones((3, 3))}, mask=jnp.ones(4, bool)), "a mask needs factored errors"),
        (Write({"w": jnp.ones((3, 3))}, gates={"eta": jnp.ones(4)}), "gates and queries"),
        (Write({"w": jnp.ones((3, 3))}, query=jnp.ones((4, 3))), "gates and queries"),
    ],
)
def test_a_global_level_refuses_what_it_cannot_use(write, message):
    n = nest(level(LINEAR, optax.sgd(1.0), 4), error=lambda params, carry, x: ((write,), carry, x))
    with pytest.raises(ValueError, match=message):
        n.apply(n.init(n.params(jax.random.key(1))), X)


def test_named_gates_must_come_and_are_for_global_levels():
    write = Write({"w": jnp.ones((3, 3))}, gates={"alpha": jnp.ones(4)})
    lev = level(LINEAR, optax.sgd(1.0), 4, gates=("eta", "log_alpha"))
    n = nest(lev, error=lambda params, carry, x: ((write,), carry, x))
    with pytest.raises(ValueError, match=r"gates are \('eta', 'log_alpha'\), but its errors come with \['alpha'\]"):
        n.apply(n.init(n.params(jax.random.key(1))), X)
    with pytest.raises(ValueError, match=r"gates=\('eta',\) are for a global level"):
        level(LINEAR, dgd(), 4, gates=("eta",))


def test_running_reads_need_a_place_to_go():
    with pytest.raises(ValueError, match="give the level an objective"):
        level(LINEAR, optax.sgd(1.0), 4, read="after")
    reading = level(LINEAR, optax.sgd(1.0), 4, objective=l2_regression, read="after")
    with pytest.raises(ValueError, match="output="):
        nest(reading, error=outer_error)
    with pytest.raises(ValueError, match="output="):
        nest(reading, output=lambda ys, reads: ys)


def test_a_wrong_phase_is_refused():
    n = nest(level(LINEAR, dgd(0.1), 4, objective=l2_regression))
    state, _ = n.apply(n.init(n.params(jax.random.key(1))), Tokens(X[:3], X[:3]))
    with pytest.raises(ValueError, match=r"3 tokens after .* got phase=0"):
        n.apply(state, Tokens(X, X), phase=0)
    with pytest.raises(TypeError, match="Python integer"):
        n.apply(state, Tokens(X, X), phase=jnp.int32(3))  # type: ignore[arg-type]
    n.apply(state, Tokens(X, X), phase=7)  # the same place on the clock


@pytest.mark.parametrize("rule", [dgd(0.3, momentum=0.9), optax.sgd(0.1, momentum=0.9)])
def test_truncation_cuts_the_rule_state_too(rule):
    """With bptt_chunks=2 nothing of chunks 0 and 1 reaches the outputs of chunk 3 but through the start."""
    n = nest(level(LINEAR, rule, 2, objective=l2_regression, bptt_chunks=2))
    params = n.params(jax.random.key(1))

    def late(values):
        return jnp.sum(n.apply(n.init(params), Tokens(X, values, X))[1][6:] ** 2)

    grads = jax.grad(late)(X)
    np.testing.assert_array_equal(grads[:4], 0)
    assert jnp.any(grads[4:6] != 0)


def test_a_weight_that_cannot_be_factored_is_named():
    params = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3))}
    with pytest.raises(ValueError, match=r"'a'.* is used twice"):
        factored_vjp(lambda refs, linear: (linear(linear(X, refs["a"]), refs["a"]).sum(), None), params)
    with pytest.raises(ValueError, match=r"'b'.* must each be used"):
        factored_vjp(lambda refs, linear: (linear(X, refs["a"]).sum(), None), params)


def test_unknown_phase_gives_finite_gradients_through_adam():
    """A rule that is stepped on pending errors of zero and not selected must not poison the gradient."""
    n = nest(
        level(cms_memory(3, 4), optax.adam(1e-2), 4),
        error=lambda params, carry, x: (
            jax.grad(lambda p: sum(jnp.sum(jnp.sum(x) * w) for w in p[0].values()))(params),
            carry,
            x,
        ),
    )
    params = n.params(jax.random.key(1))
    quiet = jnp.where((jnp.arange(8) % 4 == 3)[:, None], X, 0)  # nothing pending until a chunk's last token

    def loss(scale):
        state = n.init(params)
        state = state._replace(phase=jnp.int32(0))
        end, _ = jax.jit(lambda s, x: n.apply(s, x))(state, quiet * scale)
        return sum(jnp.sum(w) for w in jax.tree.leaves(end.levels[0].start))

    assert jnp.isfinite(jax.grad(loss)(1.0))
