"""Named shapes of real calls, shared by tests and benchmarks, and random arguments for them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class ArgSpec(NamedTuple):
    """Shapes, the clock, the rule, and the gates that are present."""

    batch: int
    tokens: int
    heads: int
    width: int
    hidden: int
    chunk_size: int
    decay: bool = True  # there is a log_alpha
    momentum: bool = True
    dtype: str = "float32"
    erase: bool = False  # delta gradient descent, as Hope writes; False: gradient descent, as Titans does


# The long-term memory module of Titans: gradient descent with momentum and forgetting.
TITANS: dict[str, Any] = {"decay": False, "exact": False}

# Rows are the sequences that a device holds on pods of the usual size. Nobody has published widths: heads of 64 that
# fill the residual stream, memories with 64 hidden units and a clock of 16 tokens, as this library has them (spec 8.3).
_LAYERS = {
    "140m": ArgSpec(2, 4096, 12, 64, 64, 16, dtype="bfloat16"),
    "760m": ArgSpec(4, 4096, 24, 64, 64, 16, dtype="bfloat16"),
    "1300m": ArgSpec(4, 4096, 32, 64, 64, 16, dtype="bfloat16"),
}

ARG_SPECS = {
    # Small enough for a CPU.
    "titans_layer": ArgSpec(1, 512, 4, 64, 64, 16),
    "titans_layer_2048": ArgSpec(1, 2048, 4, 64, 64, 16),
    "titans_without_momentum": ArgSpec(1, 512, 4, 64, 64, 16, momentum=False),
    "titans_wide_chunks": ArgSpec(1, 512, 4, 64, 64, 64),
    "hope_layer": ArgSpec(1, 512, 4, 64, 64, 16, erase=True),
    # For accelerators: one layer over a training sequence; of Hope's five memories one, with its elements given.
    **{f"titans_{size}_memory": spec for size, spec in _LAYERS.items()},
    **{f"hope_{size}_memory": spec._replace(erase=True) for size, spec in _LAYERS.items()},
}


def argument_shapes(spec: ArgSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """What `make_arguments(spec)` has, by shape and dtype."""
    gate_dtype = "float64" if spec.dtype == "float64" else "float32"
    time_shape = (spec.batch, spec.tokens, spec.heads)
    shape1, shape2 = ((spec.batch, spec.heads, *s) for s in ((spec.hidden, spec.width), (spec.width, spec.hidden)))
    shapes = {name: ((*time_shape, spec.width), spec.dtype) for name in ("q", "k", "v")}
    shapes |= {"eta": (time_shape, gate_dtype), "w1": (shape1, gate_dtype), "w2": (shape2, gate_dtype)}
    if spec.decay:
        shapes["log_alpha"] = (time_shape, gate_dtype)
    if spec.momentum:
        shapes["log_mu"] = (time_shape, gate_dtype)
        shapes |= {"momentum1": (shape1, gate_dtype), "momentum2": (shape2, gate_dtype)}
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


def make_arguments(spec: ArgSpec, seed: int = 0) -> dict[str, jax.Array]:
    """Order-one data: keys of unit norm, eta in (0, 0.3), alpha in (0.9, 1), mu in (0.3, 0.95)."""
    rng = np.random.default_rng(seed)
    scales = {"v": 0.5, "w1": 0.5 / spec.hidden**0.5, "w2": 1 / spec.width**0.5}
    scales |= {"momentum1": 0.1 / spec.hidden**0.5, "momentum2": 0.1 / spec.width**0.5}
    ranges = {"eta": (0.0, 0.3), "log_alpha": (0.9, 1.0), "log_mu": (0.3, 0.95)}

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name in ranges:
            x = rng.uniform(*ranges[name], shape)
            return x if name == "eta" else np.log(x)
        x = rng.normal(size=shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True) if name == "k" else scales.get(name, 1.0) * x

    return {name: jnp.asarray(draw(name, x.shape), x.dtype) for name, x in argument_shapes(spec).items()}
