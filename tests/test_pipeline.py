"""A wavefront over devices is the layer on one device: outputs, state, every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hope_jax import Tokens, dgd, l2_regression, level, mlp_memory, nest
from hope_jax.pipeline import pipelined
from hope_jax.placement import AXES, on_mesh

EPS = float(jnp.finfo(jnp.float32).eps)
ROWS, TOKENS, WIDTH = 4, 16, 4


@pytest.fixture(scope="module")
def rows():
    """A batch of MLP memories with momentum, written every second token; their starts are parameters."""
    memory = nest(level(mlp_memory(WIDTH, 8), dgd(momentum=0.9), chunk_size=2, objective=l2_regression, read="before"))

    def apply(params, state, x_BTK):
        def row(state, x_TK):
            eta = jnp.full(x_TK.shape[0], 0.2)
            return memory.apply(state, Tokens(x_TK, x_TK, jnp.tanh(x_TK), eta=eta, alpha=1 - eta * params["forget"]), 0)

        return jax.vmap(row)(state, x_BTK)

    def start(params):
        state = memory.init(params["start"])
        return jax.tree.map(lambda w: jnp.broadcast_to(w, (ROWS, *jnp.shape(w))), state)

    return apply, start, {"start": memory.params(jax.random.key(0)), "forget": jnp.array(0.1)}


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_wavefront_is_the_layer(rows, groups):
    apply, start, params = rows
    x_BTK = jax.random.normal(jax.random.key(1), (ROWS, TOKENS, WIDTH))

    def loss_of(run):
        def loss(params, x_BTK):
            state, y = run(params, start(params), x_BTK)
            ends = [w for w in jax.tree.leaves(state) if jnp.issubdtype(w.dtype, jnp.floating)]
            return (jnp.sin(y) ** 2).sum() + sum((w * jnp.cos(w)).sum() for w in ends), (y, state)

        return jax.grad(loss, (0, 1), has_aux=True)

    devices = jax.devices()[:8]
    mesh = jax.make_mesh((2, 1, 1, 4), AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)
    placed = (NamedSharding(mesh, P()), NamedSharding(mesh, P("data", "sequence")))
    step = jax.jit(on_mesh(loss_of(pipelined(apply, "sequence", groups)), mesh), in_shardings=placed)
    found, expected = step(params, x_BTK), jax.jit(loss_of(apply))(params, x_BTK)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=EPS * scale * ROWS * TOKENS)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="groups=3 does not divide 4 rows"):
        pipelined(lambda p, s, x: (s, x), "sequence", 3)({}, jnp.zeros((4, 1)), jnp.zeros((4, 8)))
