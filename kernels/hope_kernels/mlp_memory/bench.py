"""The MLP memory as the benchmark sees it: which shapes, which implementations, what a call is and what it costs.

`hope bench kernels --op mlp_memory` measures it. Its tiles are groups of chunks: `--block-t 64` keeps a state every 64
tokens, `--block-t 1` one before every chunk.
"""

from functools import partial
from typing import Any

import jax

from hope_kernels import timed_calls
from hope_kernels.measuring import Mode, Op
from hope_kernels.mlp_memory import straightforward
from hope_kernels.mlp_memory.api import IMPLEMENTATIONS, mlp_memory
from hope_kernels.mlp_memory.arg_specs import ARG_SPECS, TITANS, ArgSpec, argument_shapes, make_arguments
from hope_kernels.mlp_memory.cost import cost
from hope_kernels.timed_calls import Case

STRAIGHTFORWARD = "straightforward"  # a checkpoint around every chunk; see the module of that name


def outputs(spec: ArgSpec, implementation: str | None, block_t: int | None, inputs: dict[str, Any]) -> list[jax.Array]:
    """Reads, final weights and, where there are any, final momenta."""
    options: dict[str, Any] = {"chunk_size": spec.chunk_size, **({} if spec.erase else TITANS)}
    if implementation == STRAIGHTFORWARD:
        out = straightforward.checkpointed(**inputs, **options)
    else:
        group = None if block_t is None else max(block_t // spec.chunk_size, 1)
        out = mlp_memory(**inputs, **options, group=group, implementation=implementation)
    return [x for x in out if x is not None]


def make_case(spec: ArgSpec) -> Case:
    """Arguments and random cotangents."""
    return timed_calls.make_case(partial(outputs, spec, "reference", None), make_arguments(spec))


def shapes(spec: ArgSpec) -> Case:
    """`make_case` without the arrays."""
    return timed_calls.make_case(partial(outputs, spec, "reference", None), argument_shapes(spec))


def function(spec: ArgSpec, implementation: str, mode: Mode, block_t: int | None) -> Any:
    """What is timed, as a function of a case."""
    return timed_calls.timed(partial(outputs, spec, implementation, block_t), mode)


def reason(implementation: str, spec: ArgSpec) -> str | None:
    """Why `implementation` cannot run `spec` on this machine, as one phrase, or None."""
    if implementation == STRAIGHTFORWARD:
        return straightforward.why_not(spec)
    return timed_calls.why_not(partial(outputs, spec, implementation, None), argument_shapes(spec))


def chosen(spec: ArgSpec) -> str:
    """What `implementation=None` takes on this machine."""
    return timed_calls.chosen(partial(outputs, spec, None, None), argument_shapes(spec))


def defaults(platform: str) -> tuple[str, ...]:
    """The shapes measured where none is named."""
    if platform == "cpu":
        return ("titans_layer", "titans_layer_2048", "hope_layer")
    return tuple(name for name in ARG_SPECS if name.endswith("_memory"))


def resize(spec: ArgSpec, tokens: int | None, width: int | None) -> ArgSpec:
    """`spec` with other lengths, or with keys and hidden layer of another width."""
    spec = spec if tokens is None else spec._replace(tokens=tokens)
    return spec if width is None else spec._replace(width=width, hidden=width)


OP = Op(
    name="mlp_memory",
    specs=ARG_SPECS,
    defaults=defaults,
    implementations=(*IMPLEMENTATIONS, STRAIGHTFORWARD),
    make_case=make_case,
    shapes=shapes,
    function=function,
    reason=reason,
    chosen=chosen,
    cost=cost,
    resize=resize,
    foreign={},
)
