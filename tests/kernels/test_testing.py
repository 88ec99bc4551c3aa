"""The check that everything else relies on must fail when it should."""

import jax
import jax.numpy as jnp
import pytest

from hope_kernels.testing import check_op, relative_error, tolerance, with_poisoned_tail

X = jnp.linspace(0.1, 1.0, 12).reshape(1, 3, 4)


def reference(x):
    return jnp.sin(x), jnp.sum(x, axis=1)


def test_an_equal_function_passes_and_reports_its_errors():
    errors = check_op(lambda x: (jnp.cos(x - jnp.pi / 2), x.sum(1)), reference, {"x": X}, length=16)
    assert set(errors) == {"output.0", "output.1", "gradient.x"}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda x: (jnp.sin(x) * 1.001, x.sum(1)), r"output\.0"),
        (lambda x: (jnp.sin(x), x.sum(1) * 1.001), r"output\.1"),
        (lambda x: (jnp.sin(x).at[0, 2, 0].set(jnp.nan), x.sum(1)), r"output\.0: nan"),
        (lambda x: (jnp.sin(x), jax.lax.stop_gradient(x.sum(1))), r"gradient\.x"),
        (lambda x: (jnp.sin(x).astype(jnp.bfloat16), x.sum(1)), r"outputs are .*bfloat16.*expected"),
        (lambda x: (jnp.sin(x)[:, :2], x.sum(1)), "outputs are"),
    ],
)
def test_a_wrong_function_is_named(wrong, named):
    with pytest.raises(AssertionError, match=named):
        check_op(wrong, reference, {"x": X}, length=16)


def test_a_tail_that_leaks_is_caught():
    def leaky(k, mask):
        del mask
        return k, jnp.sum(k, axis=1)

    def tight(k, mask):
        return k, jnp.sum(jnp.where(mask[..., None], k, 0), axis=1)

    arguments = {"k": X.reshape(1, 3, 2, 2)}

    def expected(k):
        return k, jnp.sum(k, axis=1)

    check_op(with_poisoned_tail(tight, extra=2, time_arguments=("k",)), expected, arguments, length=3)
    with pytest.raises(AssertionError, match=r"output\.1: nan"):
        check_op(with_poisoned_tail(leaky, extra=2, time_arguments=("k",)), expected, arguments, length=3)


def test_tolerance_grows_with_the_square_root_of_the_length():
    assert tolerance(jnp.float32, 400) == pytest.approx(20 * tolerance(jnp.float32, 1))
    assert tolerance(jnp.float64, 1) < tolerance(jnp.float32, 1) < tolerance(jnp.bfloat16, 1)


def test_relative_error_of_zero_is_absolute():
    assert relative_error(jnp.full(4, 0.5), jnp.zeros(4)) == 0.5
    assert relative_error(jnp.zeros((0, 3)), jnp.zeros((0, 3))) == 0.0
