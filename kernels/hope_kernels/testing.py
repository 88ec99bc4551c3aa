"""Comparing an implementation with its reference: outputs and every gradient, under random cotangents."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Error per square root of the reduction length, relative to the size of the reference: some 20 roundings of the
# wide dtypes, half a rounding of bfloat16 (its sums are accumulated in float32).
TOLERANCE = {"float64": 5e-15, "float32": 1e-6, "bfloat16": 2e-3}

# Compiler options that halve the time to compile a grid of small cases.
FAST_COMPILE: dict[str, Any] = {"xla_backend_optimization_level": 0}


def tolerance(dtype: Any, length: int) -> float:
    """The allowed relative RMS error of sums over `length` terms in `dtype`."""
    return TOLERANCE[jnp.dtype(dtype).name] * length**0.5


def relative_error(value: jax.Array, reference: jax.Array) -> float:
    """RMS of the difference over RMS of the reference (over one where that is zero); NaN if anything is NaN."""
    value_64, reference_64 = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    scale = np.sqrt(np.mean(reference_64**2)) if reference_64.size else 0.0
    difference = np.sqrt(np.mean((value_64 - reference_64) ** 2)) if reference_64.size else 0.0
    return float(difference / (scale if scale > 0 else 1.0))


def check_op(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: Mapping[str, jax.Array],
    *,
    length: int,
    dtype: Any = None,
    seed: int = 0,
    compiler_options: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Assert that `op(**arguments)` and its gradients are those of `reference(**arguments)`.

    Every output takes part in the loss, with its own random cotangent, and every floating-point argument is
    differentiated. The comparison is a relative RMS error for each array; NaN never passes, nor does a wrong shape
    or dtype.

    Args:
        op: the implementation, from keyword arguments to a pytree of arrays.
        reference: the definition, with the same arguments and outputs.
        arguments: arrays by name.
        length: terms in the longest sum, for the tolerance.
        dtype: the least precise dtype at work; the least precise floating-point argument by default.
        seed: for the cotangents.
        compiler_options: for `jax.jit`; see `FAST_COMPILE`.

    Returns:
        The errors by name, "output[...]" and "gradient[...]".

    Raises:
        AssertionError: names every array that is off, with its error and the tolerance.
    """
    floating = {n: a for n, a in arguments.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    fixed = {n: a for n, a in arguments.items() if n not in floating}
    dtype = dtype or min((a.dtype for a in floating.values()), key=lambda d: jnp.finfo(d).bits)
    allowed = tolerance(dtype, length)
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda x: reference(**x, **fixed), floating)
    cotangents = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)

    def run(f: Callable[..., Any]) -> dict[str, jax.Array]:
        def both(x):
            out, pullback = jax.vjp(lambda x: f(**x, **fixed), x)
            if _types(out) != _types(shapes):
                raise AssertionError(f"outputs are {_types(out)}; expected {_types(shapes)}")
            return {"output": out, "gradient": pullback(cotangents)[0]}

        leaves = jax.tree_util.tree_leaves_with_path(jax.jit(both, compiler_options=compiler_options)(floating))
        return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}

    expected, found = run(reference), run(op)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    wrong = [f"{n}: {e:.1e}" for n, e in errors.items() if not e <= allowed]
    if wrong:
        raise AssertionError(f"relative RMS error above {allowed:.1e}: {'; '.join(wrong)}")
    return errors


def _types(tree: Any) -> str:
    """Structure, shapes and dtypes."""
    return str(jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", tree))


def with_poisoned_tail(
    op: Callable[..., Any], *, extra: int, time_arguments: Collection[str], finite: Collection[str] = ()
) -> Callable[..., Any]:
    """`op` on a longer buffer whose last `extra` tokens are masked and hold NaN, its reads cut back.

    Equal to `op` itself only if nothing of the tail reaches the outputs, the state or a gradient. Arguments carry
    time on axis 1; those named in `finite` get ones instead of NaN (what is read with has no mask). The first
    output carries time, the others do not.
    """

    def run(**arguments: jax.Array) -> Any:
        batch_time_heads = arguments["k"].shape[:3]
        tokens = batch_time_heads[1]
        mask = arguments.pop("mask", jnp.ones(batch_time_heads, bool))
        longer = {
            name: _extend(value, extra, 1.0 if name in finite else jnp.nan) if name in time_arguments else value
            for name, value in arguments.items()
        }
        first, *rest = op(**longer, mask=_extend(mask, extra, False))
        return (None if first is None else first[:, :tokens], *rest)

    return run


def _extend(x: jax.Array, extra: int, value: float | bool) -> jax.Array:
    tail = jnp.full((x.shape[0], extra, *x.shape[2:]), value, x.dtype)
    return jnp.concatenate([x, tail], axis=1)
