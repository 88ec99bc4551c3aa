"""Hints on a mesh: the numbers stay, the work is divided."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hope_jax import Tokens, delta_net
from hope_jax.placement import AXES, batch_axes, between_layers, by_head, head_axes, on_mesh, placed_delta_rule
from hope_kernels import delta_rule
from hope_kernels.testing import relative_error, tolerance


def mesh(*sizes) -> Any:
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[: int(np.prod(sizes))])


def test_without_a_mesh_nothing_happens():
    x = jnp.ones((2, 4, 6))
    assert by_head(x, 1) is x and between_layers(x) is x
    assert head_axes(4) == () and batch_axes(4) is None


@pytest.mark.parametrize(
    ("sizes", "heads", "axes"),
    [
        ((1, 1, 2, 2), 4, ("tensor", "sequence")),
        ((1, 1, 2, 4), 6, ("tensor",)),  # 6 heads divide by 2, not by 8
        ((1, 1, 4, 2), 6, ("sequence",)),
        ((1, 1, 4, 2), 3, ()),
    ],
)
def test_heads_are_divided_by_the_axes_that_go_into_them(sizes, heads, axes):
    seen = []
    on_mesh(lambda: seen.append(head_axes(heads)), mesh(*sizes))()
    assert seen == [axes]


def test_rows_that_do_not_divide_are_left_alone():
    seen = []

    def look(x_BTD):
        seen.append((batch_axes(3), between_layers(x_BTD).shape))
        return x_BTD

    jax.eval_shape(on_mesh(look, mesh(2, 1, 1, 2)), jnp.ones((3, 5, 4)))
    assert seen == [(None, (3, 5, 4))]


@pytest.fixture(scope="module")
def streams():
    """Rows of tokens for four heads, [B, T, H, K]."""
    k, v, q = (jax.random.normal(key, (4, 8, 4, 5)) for key in jax.random.split(jax.random.key(0), 3))
    return k / jnp.linalg.norm(k, axis=-1, keepdims=True), v, q


def loss_of(run):
    def loss(k, v, q):
        y, state = run(k, v, q)
        return (y**2).sum() + (state * jnp.cos(state)).sum()

    return loss


def compare(run, run_placed, arrays, sizes):
    placed = NamedSharding(mesh(*sizes), P(("data", "fsdp"), "sequence"))
    devices: Any = placed.mesh
    expected = jax.jit(jax.value_and_grad(loss_of(run), (0, 1, 2)))(*arrays)
    step = jax.jit(
        on_mesh(jax.value_and_grad(loss_of(run_placed), (0, 1, 2)), devices),
        in_shardings=(placed,) * 3,
        out_shardings=(NamedSharding(placed.mesh, P()), (placed,) * 3),
    )
    for a, b in zip(jax.tree.leaves(step(*arrays)), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) <= tolerance(a.dtype, 8 * 4)
    return step.lower(*arrays).compile().as_text() or ""


@pytest.mark.parametrize("sizes", [(2, 1, 2, 2), (1, 2, 1, 4)])
def test_the_kernel_call_is_divided(streams, sizes):
    def run(k, v, q):
        out = delta_rule(q, k, v, jnp.full(k.shape[:-1], 0.5))
        return out.y, out.state

    def run_placed(k, v, q):
        def row(k, v, q):
            out: Any = placed_delta_rule(q=q[None], k=k[None], u=v[None], eta=jnp.full((1, *k.shape[:-1]), 0.5))
            return out.y[0], out.state[0]

        return jax.vmap(row, spmd_axis_name=batch_axes(4))(*(by_head(x, 2) for x in (k, v, q)))

    program = compare(run, run_placed, streams, sizes)
    if sizes[2] == 1:  # tokens are exchanged for heads and back, and nothing is gathered
        assert "all-to-all" in program and "all-gather" not in program


def test_a_nest_on_a_mesh_is_the_nest(streams):
    nest = delta_net(5, 5)
    start = nest.params(jax.random.key(1))

    def run(k, v, q):
        def row(k, v, q):
            weights = jax.tree.map(lambda w: jnp.broadcast_to(w, (4, *w.shape)), start)
            tokens = Tokens(*(by_head(x, 1) for x in (k, v, q)), eta=jnp.full(k.shape[:2], 0.5))
            state, y = nest.apply(nest.init(weights), tokens, 0)
            return y, state.levels[0].start["w"]

        return jax.vmap(row, spmd_axis_name=batch_axes(4))(k, v, q)

    compare(run, run, streams, (2, 1, 2, 2))
