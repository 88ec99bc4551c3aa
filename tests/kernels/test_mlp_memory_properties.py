"""What holds for every implementation of the MLP memory, whatever the numbers; what its gradient keeps."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_kernels import mlp_memory
from hope_kernels.mlp_memory import IMPLEMENTATIONS
from hope_kernels.mlp_memory.arg_specs import ArgSpec, make_arguments
from hope_kernels.mlp_memory.xla import default_group
from hope_kernels.testing import FAST_COMPILE, relative_error, tolerance

SPEC = ArgSpec(batch=2, tokens=22, heads=3, width=6, hidden=4, chunk_size=4)
TIME_ARGUMENTS = ("q", "k", "v", "eta", "log_alpha", "log_mu")
EVERY = pytest.mark.parametrize("implementation", list(IMPLEMENTATIONS))
XLA = "xla"


@pytest.fixture(scope="module")
def arguments():
    return make_arguments(SPEC)


def call(implementation, **static) -> Any:
    op = partial(mlp_memory, implementation=implementation, chunk_size=SPEC.chunk_size, **static)
    return jax.jit(op, compiler_options=FAST_COMPILE)


def sum_of_squares(out) -> jax.Array:
    return sum((jnp.sum(jnp.square(x)) for x in jax.tree.leaves(out)), jnp.zeros(()))


def gradient(**static) -> Any:
    op = partial(mlp_memory, implementation=XLA, chunk_size=SPEC.chunk_size, **static)
    return jax.jit(jax.grad(lambda arguments: sum_of_squares(op(**arguments))), compiler_options=FAST_COMPILE)


def assert_close(found, expected, length=SPEC.tokens + SPEC.width):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(x, y) <= tolerance(x.dtype, length)


def assert_equal(found, expected):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_the_group_changes_nothing(arguments):
    """Six chunks, the last one cut short: groups that divide them, that do not, and one larger than all."""
    out, slope = call(XLA, group=1)(**arguments), gradient(group=1)(arguments)
    for group in (2, 4, 9, None):
        assert_close(call(XLA, group=group)(**arguments), out)
        assert_close(gradient(group=group)(arguments), slope)


@EVERY
@pytest.mark.parametrize("read", ["start", "after"])
def test_two_calls_are_one_between_chunks(implementation, read, arguments):
    run = call(implementation, read=read)
    first = run(**{n: a[:, :8] if n in TIME_ARGUMENTS else a for n, a in arguments.items()})
    state = {n: getattr(first, n) for n in ("w1", "w2", "momentum1", "momentum2")}
    second = run(**{n: arguments[n][:, 8:] for n in TIME_ARGUMENTS}, **state)
    found = (jnp.concatenate([first.y, second.y], axis=1), *second[1:])
    assert_close(found, tuple(run(**arguments)))


@EVERY
def test_the_clock_changes_the_numbers(implementation, arguments):
    other = jax.jit(partial(mlp_memory, implementation=implementation, chunk_size=3), compiler_options=FAST_COMPILE)
    assert relative_error(other(**arguments).y, call(implementation)(**arguments).y) > 1e-3


@EVERY
def test_no_step_leaves_the_weights_bit_for_bit(implementation, arguments):
    still = {n: a for n, a in arguments.items() if n not in ("log_alpha", "log_mu", "momentum1", "momentum2")}
    out = call(implementation)(**still | {"eta": jnp.zeros_like(arguments["eta"])})
    assert_equal((out.w1, out.w2), (arguments["w1"], arguments["w2"]))
    masked = call(implementation)(**arguments, mask=jnp.zeros(arguments["k"].shape[:3], bool))
    assert_equal(masked[1:], tuple(arguments[n] for n in ("w1", "w2", "momentum1", "momentum2")))


@EVERY
def test_no_tokens(implementation, arguments):
    none = {n: a[:, :0] if n in TIME_ARGUMENTS else a for n, a in arguments.items()}
    out = call(implementation)(**none)
    assert out.y.shape == (2, 0, 3, 6)
    assert_equal(out[1:], tuple(arguments[n] for n in ("w1", "w2", "momentum1", "momentum2")))


@EVERY
def test_batch_and_heads_are_apart(implementation, arguments):
    """Turning batch and heads turns the outputs."""

    def turned(tree):
        heads_at = lambda a: 2 if a.ndim == 3 or a.shape[1] == SPEC.tokens else 1  # noqa: E731
        return jax.tree.map(lambda a: jnp.roll(jnp.roll(a, 1, 0), 1, heads_at(a)), tree)

    run = call(implementation)
    assert_close(tuple(run(**turned(arguments))), turned(tuple(run(**arguments))))


@pytest.mark.slow
def test_vmap_is_a_batch(arguments):
    op = partial(mlp_memory, implementation=XLA, chunk_size=SPEC.chunk_size)
    alone = jax.vmap(lambda a: op(**jax.tree.map(lambda x: x[None], a)))
    slope = jax.grad(lambda a: sum_of_squares(alone(a)))
    assert_close(jax.tree.map(lambda x: x[:, 0], jax.jit(alone)(arguments)), call(XLA)(**arguments))
    assert_close(jax.jit(slope)(arguments), gradient()(arguments))


@pytest.mark.slow
def test_remat_changes_nothing_and_knows_the_states_by_name(arguments):
    op = partial(mlp_memory, implementation=XLA, chunk_size=SPEC.chunk_size)
    for policy in (None, jax.checkpoint_policies.save_only_these_names("mlp_memory_states")):
        again = jax.checkpoint(lambda a: sum_of_squares(op(**a)), policy=policy)
        assert_close(jax.jit(jax.grad(again), compiler_options=FAST_COMPILE)(arguments), gradient()(arguments))


@pytest.mark.parametrize(("chunks", "group"), [(1, 1), (2, 1), (4, 2), (32, 4), (33, 3), (37, 3), (100, 10)])
def test_the_default_group_is_near_the_square_root_and_divides(chunks, group):
    assert default_group(chunks) == group


def temporaries(tokens, **static) -> int:
    """Bytes that the gradient needs beside its arguments and results."""
    spec = ArgSpec(batch=1, tokens=tokens, heads=1, width=32, hidden=32, chunk_size=4, momentum=False)
    arguments = jax.eval_shape(lambda: make_arguments(spec))
    loss = lambda a: sum_of_squares(mlp_memory(**a, chunk_size=4, implementation=XLA, **static))  # noqa: E731
    compiled: Any = jax.jit(jax.grad(loss)).lower(arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_of_the_gradient_is_linear_in_time():
    """2 K F numbers for every `group` chunks, beside some twelve arrays like the keys."""
    lengths = (256, 512, 768)
    state = 2 * 32 * 32 * 4
    slopes = {}
    for group in (1, 8):
        sizes = [temporaries(t, group=group) for t in lengths]
        assert abs((sizes[2] - sizes[1]) / (sizes[1] - sizes[0]) - 1) < 0.1
        slopes[group] = (sizes[2] - sizes[0]) / (lengths[2] - lengths[0])
    saved = state / 4 * (1 - 1 / 8)
    assert slopes[1] - slopes[8] == pytest.approx(saved, rel=0.1)
    assert slopes[1] == pytest.approx(state / 4 + 32 * 4 * 12, rel=0.3)


@pytest.mark.slow
def test_memory_of_the_default_group_is_the_smallest():
    assert temporaries(1024) < temporaries(1024, group=1) / 2
    assert temporaries(1024) < temporaries(1024, group=256) / 2
