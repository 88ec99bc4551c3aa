"""Decoding token by token is the parallel form."""

import jax
import jax.numpy as jnp
import pytest

from hope_kernels import delta_rule, delta_rule_step
from hope_kernels.delta_rule.arg_specs import ArgSpec, make_arguments
from hope_kernels.testing import relative_error, tolerance

SPEC = ArgSpec(batch=2, tokens=9, heads=4, key_width=5, value_width=3, key_heads=2)


@pytest.mark.parametrize(("read", "momentum"), [("after", False), ("before", True)])
def test_steps_are_the_parallel_form(read, momentum):
    arguments = make_arguments(SPEC._replace(momentum=momentum))
    state, z = arguments.pop("initial_state"), arguments.pop("initial_momentum", None)
    expected = delta_rule(**arguments, initial_state=state, initial_momentum=z, read=read, scale=0.5)
    step = jax.jit(lambda token, state, z: delta_rule_step(**token, state=state, momentum=z, read=read, scale=0.5))
    reads = []
    for t in range(SPEC.tokens):
        y, state, z = step({name: x[:, t] for name, x in arguments.items()}, state, z)
        reads.append(y)
    found = (jnp.stack(reads, axis=1), state, z)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(tuple(expected)), strict=True):
        assert relative_error(x, y) <= tolerance(x.dtype, SPEC.tokens + SPEC.key_width)


def test_without_a_query_only_the_state_moves():
    arguments = {name: x[:, 0] for name, x in make_arguments(SPEC).items() if name not in ("q", "initial_state")}
    out = delta_rule_step(None, **arguments, state=jnp.zeros((2, 4, 5, 3)))
    assert out.y is None and float(jnp.abs(out.state).max()) > 0
