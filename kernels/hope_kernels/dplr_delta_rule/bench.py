"""The operation as the benchmark sees it: what a call is, and the least it costs.

Counted are the products of this folder's README, a multiply-add as two operations, per token and head in tiles of C:

| | K V | C K | C V | C^2 |
|---|---|---|---|---|
| forward | 8: c S, q S, b E, k U | 8: four kinds of scores | 8: two kinds of scores with U, E; the system | 2/3 |
| gradients | 18: their adjoints, c S again | 24: adjoints, scores again | 20: adjoints, two again | |

and the arrays of tokens and the states, written and read once; for gradients a state per tile as well.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hope_kernels.dplr_delta_rule.api import IMPLEMENTATIONS, dplr_delta_rule
from hope_kernels.dplr_delta_rule.arg_specs import ARG_SPECS, ArgSpec, make_arguments
from hope_kernels.dplr_delta_rule.xla import BLOCK_T
from hope_kernels.measuring import Cost, Mode, Op

type Case = tuple[dict[str, Any], list[Any]]  # the arrays by name, and a cotangent for each output


def make_case(spec: ArgSpec) -> Case:
    """Arguments and random cotangents."""
    rng, arguments = np.random.default_rng(1), make_arguments(spec)
    like = arguments["u"], arguments["initial_state"]
    return arguments, [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in like]


def function(implementation: str | None, mode: Mode, block_t: int | None) -> Any:
    """What is timed: the outputs of a case, and with them the gradients of all its floating-point arrays."""

    def forward(inputs: dict[str, Any]) -> list[jax.Array]:
        return [x for x in dplr_delta_rule(**inputs, implementation=implementation, block_t=block_t) if x is not None]

    def with_gradients(case: Case) -> tuple[Any, Any]:
        fixed = {n: x for n, x in case[0].items() if not jnp.issubdtype(x.dtype, jnp.floating)}
        moving = {n: x for n, x in case[0].items() if n not in fixed}
        out, pullback = jax.vjp(lambda moving: forward(moving | fixed), moving)
        return out, pullback(case[1])[0]

    return (lambda case: forward(case[0])) if mode == "forward" else with_gradients


def cost(spec: ArgSpec, mode: Mode, block_t: int | None = None) -> Cost:
    """The counts for the whole call."""
    gradients = mode != "forward"
    tile = min(block_t or BLOCK_T, spec.tokens)
    key, value, tokens = spec.key_width, spec.value_width, spec.batch * spec.tokens
    flops = 8 * key * value + 8 * tile * (key + value) + 2 / 3 * tile**2
    if gradients:
        flops += 18 * key * value + 24 * tile * key + 20 * tile * value
    item, wide = {"bfloat16": 2, "float32": 4, "float64": 8}[spec.dtype], 8 if spec.dtype == "float64" else 4
    inputs, state = item * (4 * key + value) + wide * key, wide * key * value
    size = inputs + item * value + 2 * state / spec.tokens
    if gradients:
        size += 2 * inputs + item * value + 2 * state / spec.tokens + 2 * state / tile
    token_heads = tokens * spec.heads
    return Cost(tokens, token_heads, token_heads * flops, token_heads * size, spec.dtype)


def resize(spec: ArgSpec, tokens: int | None, width: int | None) -> ArgSpec:
    """`spec` with other lengths, or with keys and values of another width."""
    spec = spec if tokens is None else spec._replace(tokens=tokens)
    return spec if width is None else spec._replace(key_width=width, value_width=width)


OP = Op(
    name="dplr_delta_rule",
    specs=ARG_SPECS,
    defaults=lambda platform: ("short", "layer", "layer_bfloat16") if platform == "cpu" else ("b8_t4096_h32_k64",),
    implementations=tuple(IMPLEMENTATIONS),
    make_case=make_case,
    shapes=lambda spec: jax.eval_shape(lambda: make_case(spec)),
    function=function,
    reason=lambda implementation, spec: None,  # both run anywhere
    chosen=lambda spec: next(iter(IMPLEMENTATIONS)),
    cost=cost,
    resize=resize,
    foreign={},
)
