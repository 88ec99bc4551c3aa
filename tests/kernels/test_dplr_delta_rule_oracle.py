"""The XLA form against the token loop in float64, in the cases that break chunked forms."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_kernels import dplr_delta_rule
from hope_kernels.dplr_delta_rule.arg_specs import ArgSpec, make_arguments
from hope_kernels.testing import FAST_COMPILE, relative_error
from tests.kernels.cases import BOUNDS, Arguments

SPEC = ArgSpec(batch=1, tokens=77, heads=2, key_width=32, value_width=16)
WIDE = ("log_alpha", "initial_state")  # not rounded to the input dtype


def _random(arguments: Arguments, rng: np.random.Generator) -> None:
    del arguments, rng


def _forgets_everything(arguments: Arguments, rng: np.random.Generator) -> None:
    """alpha at the floor in every third token, and in a third of the channels of all others."""
    del rng
    token, channel = np.arange(77)[None, :, None, None], np.arange(32)
    arguments["log_alpha"] = jnp.where((token % 3 == 0) | (channel % 3 == 0), -jnp.inf, arguments["log_alpha"])


def _forgets_fast(arguments: Arguments, rng: np.random.Generator) -> None:
    """A quarter of the channels keep e^-9 of themselves with every token for 20 tokens, and nearly all after that."""
    fast = (np.arange(32) < 8) & (np.arange(77) % 40 < 20)[None, :, None, None]
    usual = 0.01 * rng.uniform(-9.0, 0.0, arguments["log_alpha"].shape)
    arguments["log_alpha"] = jnp.asarray(np.where(fast, -9.0, usual), jnp.float32)


def _retains_everything(arguments: Arguments, rng: np.random.Generator) -> None:
    del rng
    arguments["log_alpha"] = jnp.zeros_like(arguments["log_alpha"])


def _erases_nothing(arguments: Arguments, rng: np.random.Generator) -> None:
    del rng
    arguments["b"] = jnp.zeros_like(arguments["b"])


def _identical_keys(arguments: Arguments, rng: np.random.Generator) -> None:
    """One direction over and over, erased completely every time, nothing forgotten."""
    _retains_everything(arguments, rng)
    for name in ("k", "b", "c"):
        arguments[name] = jnp.broadcast_to(arguments["c"][:, :1], arguments["c"].shape)


def _reflects(arguments: Arguments, rng: np.random.Generator) -> None:
    """b = 2 c: nothing shrinks."""
    _retains_everything(arguments, rng)
    arguments["b"] = 2 * arguments["c"]


def _unrelated(arguments: Arguments, rng: np.random.Generator) -> None:
    """b in another direction than c, and long: most transitions enlarge something."""
    b = rng.normal(size=arguments["b"].shape)
    arguments["b"] = jnp.asarray(2 * b / np.linalg.norm(b, axis=-1, keepdims=True), arguments["b"].dtype)


def _far_apart_in_size(arguments: Arguments, rng: np.random.Generator) -> None:
    del rng
    arguments["b"], arguments["c"] = arguments["b"] * 2.0**40, arguments["c"] / 2.0**40


def _masked_stretch(arguments: Arguments, rng: np.random.Generator) -> None:
    """A stretch longer than a tile in which nothing counts, and it holds NaN."""
    del rng
    counts = ((jnp.arange(77) < 5) | (jnp.arange(77) >= 74))[None, :, None]
    arguments["mask"] = jnp.broadcast_to(counts, arguments["mask"].shape)
    for name in ("k", "u", "b", "c", "log_alpha"):
        arguments[name] = jnp.where(counts[..., None], arguments[name], jnp.nan)


def _everything_masked(arguments: Arguments, rng: np.random.Generator) -> None:
    del rng
    arguments["mask"] = jnp.zeros_like(arguments["mask"])


def _documents(arguments: Arguments, rng: np.random.Generator) -> None:
    """Packed documents, one of them a single token, one beginning with a tile, one of only masked tokens."""
    del rng
    ids = np.searchsorted([7, 8, 32, 50, 60], np.arange(77), side="right")
    arguments["segment_ids"] = jnp.asarray(ids, jnp.int32)[None]
    arguments["mask"] = jnp.broadcast_to(jnp.asarray(ids != 4)[None, :, None], arguments["mask"].shape)


CASES: dict[str, Callable[[Arguments, np.random.Generator], None]] = {
    "random": _random,
    "forgets everything": _forgets_everything,
    "forgets fast": _forgets_fast,
    "retains everything": _retains_everything,
    "erases nothing": _erases_nothing,
    "identical keys": _identical_keys,
    "reflects": _reflects,
    "b and c unrelated": _unrelated,
    "b and c far apart in size": _far_apart_in_size,
    "masked stretch": _masked_stretch,
    "everything masked": _everything_masked,
    "documents": _documents,
}


def arguments_of(case: str, dtype: str) -> Arguments:
    """Mask and documents are there in every case, so that all share a program."""
    arguments = make_arguments(SPEC._replace(dtype=dtype))
    arguments["mask"] = jnp.ones((1, 77, 2), bool)
    arguments["segment_ids"] = jnp.zeros((1, 77), jnp.int32)
    CASES[case](arguments, np.random.default_rng(1))
    return arguments


@partial(jax.jit, static_argnames=("implementation", "block_t"), compiler_options=FAST_COMPILE)
def _both(arguments: Arguments, cotangents: Any, *, implementation: str, block_t: int | None) -> dict[str, jax.Array]:
    """Outputs, and the gradients of all arguments with a cotangent on the final state as well."""
    fixed = {n: arguments[n] for n in ("mask", "segment_ids")}
    floating = {n: a for n, a in arguments.items() if n not in fixed}
    run: Any = partial(dplr_delta_rule, **fixed, implementation=implementation, block_t=block_t)
    (y, state), pullback = jax.vjp(lambda a: tuple(run(**a)), floating)
    return {"y": y, "state": state} | {f"d {n}": g for n, g in pullback(cotangents)[0].items()}


def _cotangents(arguments: Arguments) -> Any:
    rng = np.random.default_rng(2)
    return tuple(jnp.asarray(rng.normal(size=a.shape), a.dtype) for a in (arguments["u"], arguments["initial_state"]))


def _oracle(arguments: Arguments, cotangents: Any, rounding: float) -> dict[str, Any]:
    """The token loop in float64; what has the input dtype is first moved by up to `rounding`."""
    rng = np.random.default_rng(3)

    def widen(path: Any, x: jax.Array) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        wide = np.asarray(x, np.float64)
        kept = any(getattr(key, "key", None) in WIDE for key in path)
        return jnp.asarray(wide if kept else wide * (1 + rounding * rng.uniform(-1, 1, wide.shape)))

    with jax.enable_x64(True):
        arguments, cotangents = jax.tree_util.tree_map_with_path(widen, (arguments, cotangents))
        found = _both(arguments, cotangents, implementation="reference", block_t=None)
        return {n: np.asarray(x) for n, x in found.items()}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_hard_cases(dtype, case):
    """Within the bounds or, where a rounding of the inputs alone moves the oracle further, three times that."""
    arguments = arguments_of(case, dtype)
    cotangents = _cotangents(arguments)
    found = _both(arguments, cotangents, implementation="xla", block_t=None)
    expected = _oracle(arguments, cotangents, 0.0)
    errors = {n: relative_error(x, expected[n]) for n, x in found.items()}
    if not max(errors.values()) <= BOUNDS[dtype]:
        moved = _oracle(arguments, cotangents, float(jnp.finfo(dtype).eps) / 2)
        allowed = {n: max(BOUNDS[dtype], 3 * relative_error(moved[n], expected[n])) for n in errors}
        wrong = {n: f"{e:.1e} (allowed {allowed[n]:.1e})" for n, e in errors.items() if not e <= allowed[n]}
        assert not wrong, wrong


def test_zero_cotangents_give_zero_gradients():
    arguments = arguments_of("random", "float32")
    zero = jax.tree.map(jnp.zeros_like, _cotangents(arguments))
    gradients = [x for n, x in _both(arguments, zero, implementation="xla", block_t=None).items() if n[:2] == "d "]
    assert len(gradients) == 7 and max(float(jnp.abs(g).max()) for g in gradients) == 0
