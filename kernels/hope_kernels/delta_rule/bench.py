"""The delta rule as the benchmark sees it: which shapes, which implementations, what a call is and what it costs.

`hope bench kernels` measures it; `hope bench kernels --help` says how.
"""

from functools import partial
from typing import Any

import jax

from hope_kernels import timed_calls
from hope_kernels.chips import CHIPS
from hope_kernels.delta_rule import flash_linear_attention, straightforward
from hope_kernels.delta_rule.api import IMPLEMENTATIONS, delta_rule
from hope_kernels.delta_rule.arg_specs import ARG_SPECS, ArgSpec, argument_shapes, make_arguments
from hope_kernels.delta_rule.config import Config, tpu_sizes
from hope_kernels.delta_rule.cost import TILE, cost, kernel_cost
from hope_kernels.measuring import Mode, Op, StaticRow
from hope_kernels.timed_calls import Case

# The chunked form as one would first write it; see the module of that name.
STRAIGHTFORWARD = "straightforward"
FOREIGN = "flash_linear_attention"


def make_case(spec: ArgSpec) -> Case:
    """Arguments and random cotangents."""
    return timed_calls.make_case(partial(outputs, "reference", None), make_arguments(spec))


def shapes(spec: ArgSpec) -> Case:
    """`make_case` without the arrays."""
    return timed_calls.make_case(partial(outputs, "reference", None), argument_shapes(spec))


def outputs(implementation: str | None, block_t: int | None, inputs: dict[str, Any]) -> list[jax.Array]:
    """Reads, final state and, where there is one, final momentum."""
    if implementation == STRAIGHTFORWARD:
        return list(straightforward.chunked(**inputs, chunk=block_t or min(TILE, inputs["k"].shape[1])))
    out = delta_rule(**inputs, implementation=implementation, config=Config(block_t=block_t))
    return [x for x in out if x is not None]


def function(spec: ArgSpec, implementation: str, mode: Mode, block_t: int | None) -> Any:
    """What is timed, as a function of a case."""
    del spec
    return timed_calls.timed(partial(outputs, implementation, block_t), mode)


def reason(implementation: str, spec: ArgSpec) -> str | None:
    """Why `implementation` cannot run `spec` on this machine, as one phrase, or None."""
    if implementation == FOREIGN:
        return flash_linear_attention.why_not(spec)
    if implementation == STRAIGHTFORWARD:
        return straightforward.why_not(spec)
    return timed_calls.why_not(partial(outputs, implementation, None), argument_shapes(spec))


def chosen(spec: ArgSpec) -> str:
    """What `implementation=None` takes on this machine."""
    return timed_calls.chosen(partial(outputs, None, None), argument_shapes(spec))


def defaults(platform: str) -> tuple[str, ...]:
    """The shapes measured where none is named."""
    if platform == "cpu":
        return ("short", "layer", "layer_momentum", "layer_bfloat16", "chunk_of_16", "one_token")
    large = tuple(name for name, spec in ARG_SPECS.items() if name.startswith("b") and spec.dtype == "bfloat16")
    return (*large, *(name for name in ARG_SPECS if name.startswith("hope_")))


def resize(spec: ArgSpec, tokens: int | None, width: int | None) -> ArgSpec:
    """`spec` with other lengths, or with keys and values of another width."""
    spec = spec if tokens is None else spec._replace(tokens=tokens)
    return spec if width is None else spec._replace(key_width=width, value_width=width)


def static(topology: str) -> list[StaticRow]:
    """The TPU kernels on the shape of their budget, read from the schedule of the compiler; takes a minute or more."""
    from hope_kernels.delta_rule.pallas_tpu import budget

    chip = CHIPS[topology.split(":")[0]]
    tile = tpu_sizes(budget.TOPOLOGIES[topology], budget.TOKENS, Config()).block_t
    spec = ArgSpec(1, budget.TOKENS, budget.HEADS, budget.WIDTH, budget.WIDTH, dtype="bfloat16")
    bounds = {}
    for kernel in budget.KERNELS:
        least = kernel_cost(spec, "gradients" if kernel.startswith("backward") else kernel, tile)
        seconds = max(chip.compute_seconds(least.flops, least.dtype) or 0.0, chip.memory_seconds(least.bytes))
        bounds[kernel] = seconds / least.token_heads * 1e9
    return [
        StaticRow(kernel, row["bundles"], row["spills"], row["nanoseconds"], bounds[kernel])
        for kernel, row in budget.measure(topology).items()
    ]


OP = Op(
    name="delta_rule",
    specs=ARG_SPECS,
    defaults=defaults,
    implementations=(*IMPLEMENTATIONS, STRAIGHTFORWARD, FOREIGN),
    make_case=make_case,
    shapes=shapes,
    function=function,
    reason=reason,
    chosen=chosen,
    cost=cost,
    resize=resize,
    foreign={FOREIGN: flash_linear_attention.measure},
    static=static,
)
