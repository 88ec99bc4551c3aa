"""The hard cases of the delta rule and the float64 oracle that every implementation is held against."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from hope_kernels import delta_rule
from hope_kernels.delta_rule.api import LOG_FLOOR
from hope_kernels.delta_rule.arg_specs import ArgSpec, make_arguments
from hope_kernels.testing import FAST_COMPILE

# Relative L2 error allowed of outputs, final state and every gradient, by the dtype of the inputs.
BOUNDS = {"float32": 2e-5, "bfloat16": 5e-3}

LONGEST_TILE = 128  # of any implementation that is left to choose

type Arguments = dict[str, Any]


def _random(arguments: Arguments) -> None:
    del arguments


def _correlated_keys(arguments: Arguments) -> None:
    """Keys within a narrow cone: cosines of about 0.9."""
    k = arguments["k"].astype(jnp.float32)
    k = k[:, :1] + 0.3 * k
    arguments["k"] = (k / jnp.linalg.norm(k, axis=-1, keepdims=True)).astype(arguments["k"].dtype)


def _identical_keys(arguments: Arguments) -> None:
    """One key over and over, erased completely every time, nothing forgotten."""
    arguments["k"] = jnp.broadcast_to(arguments["k"][:, :1], arguments["k"].shape)
    arguments["eta"] = jnp.ones_like(arguments["eta"])
    arguments["log_alpha"] = jnp.zeros_like(arguments["log_alpha"])


def _forgets_everything(arguments: Arguments) -> None:
    """alpha at the floor for every third token."""
    third = (jnp.arange(arguments["log_alpha"].shape[1]) % 3 == 0)[None, :, None]
    arguments["log_alpha"] = jnp.where(third, -jnp.inf, arguments["log_alpha"])


def _erases_nothing(arguments: Arguments) -> None:
    arguments["eta"] = jnp.zeros_like(arguments["eta"])


def _erases_everything(arguments: Arguments) -> None:
    arguments["eta"] = jnp.ones_like(arguments["eta"])


def _masked_stretch(arguments: Arguments) -> None:
    """A stretch longer than any tile in which nothing counts, and it holds NaN."""
    time = jnp.arange(arguments["k"].shape[1])
    counts = (time < 5) | (time >= arguments["k"].shape[1] - 3)
    arguments["mask"] = jnp.broadcast_to(counts[None, :, None], arguments["u"].shape[:3])
    for name in ("k", "u", "eta", "log_alpha"):
        keep = counts.reshape(1, -1, *[1] * (arguments[name].ndim - 2))
        arguments[name] = jnp.where(keep, arguments[name], jnp.nan)


def _documents(arguments: Arguments) -> None:
    """Packed documents, one of them a single token."""
    ids = np.searchsorted([7, 8, 30], np.arange(arguments["k"].shape[1]), side="right")
    arguments["segment_ids"] = jnp.broadcast_to(jnp.asarray(ids), arguments["k"].shape[:2])


CASES: dict[str, Callable[[Arguments], None]] = {
    "random": _random,
    "correlated keys": _correlated_keys,
    "identical keys": _identical_keys,
    "forgets everything": _forgets_everything,
    "erases nothing": _erases_nothing,
    "erases everything": _erases_everything,
    "masked stretch": _masked_stretch,
    "documents": _documents,
}


def arguments_of(case: str, spec: ArgSpec, seed: int = 0) -> Arguments:
    """Arguments of `spec`, turned into the case."""
    arguments = make_arguments(spec, seed)
    CASES[case](arguments)
    return arguments


class _Problem(NamedTuple):
    """A call, its cotangents, and what it is differentiated by."""

    floating: Arguments
    fixed: Arguments
    cotangents: Any
    read: Any


def check_against_oracle(arguments: Arguments, *, read: Any = "after", **how: Any) -> dict[str, float]:
    """Assert that delta_rule(**arguments, **how) and its gradients are those of the token loop in float64.

    The oracle gets the same numbers, widened, the cotangents included. Allowed are the `BOUNDS`, or where the problem
    itself is worse conditioned than that, three times what one rounding of every input and cotangent does to the
    oracle: no arithmetic in that dtype can be expected to do better. Decays are differences of sums of log alpha
    over a tile in float32, so their relative error, half an ulp of the largest such sum, is allowed as well (spec 5.4).

    Returns:
        The relative L2 errors by name, infinite for what is not finite.
    """
    problem = _problem(arguments, read)
    dtype = arguments["k"].dtype
    found = _both(problem, **how)
    oracle = _oracle(problem, 0.0)
    errors = {n: _relative(x, oracle[n]) for n, x in found.items()}
    bound = max(BOUNDS[dtype.name], _decay_error(arguments, how["config"].block_t or LONGEST_TILE))
    if max(errors.values()) > bound:
        moved = _oracle(problem, float(jnp.finfo(dtype).eps) / 2)
        allowed = {n: max(bound, 3 * _relative(moved[n], oracle[n])) for n in errors}
        wrong = {n: f"{e:.1e} (allowed {allowed[n]:.1e})" for n, e in errors.items() if not e <= allowed[n]}
        assert not wrong, wrong
    return errors


def _decay_error(arguments: Arguments, tile: int) -> float:
    """2^-24 times the largest sum of |log alpha| over a tile."""
    if "log_alpha" not in arguments:
        return 0.0
    sizes = np.minimum(np.abs(np.nan_to_num(np.asarray(arguments["log_alpha"], np.float64))), -LOG_FLOOR)
    sums = [sizes[:, n : n + tile].sum(axis=1).max() for n in range(0, sizes.shape[1], tile)]
    return float(max(sums)) * 2.0**-24


def zero_cotangent_gradients(arguments: Arguments, **how: Any) -> dict[str, float]:
    """The largest absolute entry of every gradient for cotangents of zero."""
    problem = _problem(arguments, "after")
    problem = problem._replace(cotangents=jax.tree.map(jnp.zeros_like, problem.cotangents))
    return {n: float(np.abs(x).max()) for n, x in _both(problem, **how).items() if n.startswith("d ")}


def _problem(arguments: Arguments, read: Any) -> _Problem:
    floating = {n: a for n, a in arguments.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    fixed = {n: a for n, a in arguments.items() if n not in floating}
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda a: tuple(delta_rule(**a, **fixed, read=read)), floating)
    cotangents = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
    return _Problem(floating, fixed, cotangents, read)


def _both(problem: _Problem, **how: Any) -> dict[str, np.ndarray]:
    """Outputs and gradients by name."""

    def run(floating: Arguments, cotangents: Any) -> dict[str, Any]:
        out, pullback = jax.vjp(lambda a: tuple(delta_rule(**a, **problem.fixed, read=problem.read, **how)), floating)
        return {"y": out[0], "state": out[1]} | {f"d {n}": g for n, g in pullback(cotangents)[0].items()}

    found = jax.jit(run, compiler_options=FAST_COMPILE)(problem.floating, problem.cotangents)
    return {n: np.asarray(x, np.float64) for n, x in found.items()}


def _oracle(problem: _Problem, rounding: float) -> dict[str, np.ndarray]:
    """The token loop in float64; every element of q, k, u and the cotangents is first moved by up to `rounding`."""
    rng = np.random.default_rng(3)

    def widen(path: Any, x: jax.Array) -> jax.Array:
        wide = np.asarray(x, np.float64)
        gate_or_state = any(getattr(key, "key", None) in ("eta", "log_alpha", "initial_state") for key in path)
        return jnp.asarray(wide if gate_or_state else wide * (1 + rounding * rng.uniform(-1, 1, wide.shape)))

    with jax.enable_x64(True):
        floating, cotangents = jax.tree_util.tree_map_with_path(widen, (problem.floating, problem.cotangents))
        return _both(problem._replace(floating=floating, cotangents=cotangents), implementation="reference")


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative L2 error; the absolute one where zero is expected."""
    size = float(np.linalg.norm(expected))
    error = float(np.linalg.norm(found - expected)) / (size if size > 0 else 1.0)
    return error if np.isfinite(error) else float("inf")


def gate_cosine(arguments: Arguments, **how: Any) -> float:
    """Cosine between the call's gradient of gate parameters and the oracle's.

    The gates of a model are made from parameters shared by all tokens, so their gradients are sums over tokens that
    can cancel. Here log_alpha and eta get, per head, a bias and a slope over a random token feature.
    """
    fixed = {n: a for n, a in arguments.items() if n not in ("log_alpha", "eta")}
    rng = np.random.default_rng(2)
    heads = arguments["eta"].shape[2]
    feature = rng.normal(size=arguments["eta"].shape)
    weight = rng.normal(size=arguments["u"].shape)

    def loss(parameters, arrays, **how):
        fixed, gates, feature, weight = arrays
        moved = {n: gates[n] + p[None, None, 0] + p[None, None, 1] * feature for n, p in parameters.items()}
        y: Any = delta_rule(**fixed, **moved, **how).y
        return jnp.sum(weight * y.astype(weight.dtype))

    def gradient(dtype, **how):
        arrays = (fixed, {n: arguments[n] for n in ("log_alpha", "eta")}, feature, weight)
        arrays = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)).astype(dtype(x)), arrays)
        start = {n: jnp.zeros((2, heads), arrays[2].dtype) for n in ("log_alpha", "eta")}
        grads = jax.jit(lambda p, a: jax.grad(loss)(p, a, **how), compiler_options=FAST_COMPILE)(start, arrays)
        return np.concatenate([np.asarray(g, np.float64).ravel() for g in jax.tree.leaves(grads)])

    with jax.enable_x64(True):
        expected = gradient(lambda x: np.float64, implementation="reference")
    found = gradient(lambda x: getattr(x, "dtype", np.float32) if isinstance(x, jax.Array) else np.float32, **how)
    return float(found @ expected / (np.linalg.norm(found) * np.linalg.norm(expected)))


def calls_of(primitive: str, function: Callable[..., Any], *args: Any) -> list[Any]:
    """The equations of a primitive in the traced function, however deep."""
    found = []

    def walk(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name == primitive:
                found.append(equation)
            for sub in jax.extend.core.jaxprs_in_params(equation.params):
                walk(sub)

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return found
