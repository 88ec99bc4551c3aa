"""Measuring one operation on named shapes: time by implementation, memory, compile time, and what the chip allows."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from hope_kernels.chips import Chip
from hope_kernels.device_time import device_seconds

type Mode = Literal["forward", "forward+gradients"]
MODES: tuple[Mode, ...] = ("forward", "forward+gradients")


class Cost(NamedTuple):
    """What a call must do at least."""

    tokens: int
    token_heads: int  # tokens x heads
    flops: float  # operations, a multiply-add counted as two
    bytes: float  # between the chip and its main memory
    dtype: str  # of the matrix products


class Op(NamedTuple):
    """An operation as the benchmark sees it. A `case` is one pytree of arrays, a `spec` the description of one."""

    name: str
    specs: Mapping[str, Any]
    defaults: Callable[[str], tuple[str, ...]]  # platform -> names of specs
    implementations: tuple[str, ...]
    make_case: Callable[[Any], Any]  # spec -> case
    shapes: Callable[[Any], Any]  # spec -> the case as ShapeDtypeStruct
    function: Callable[[Any, str, Mode, int | None], Callable[[Any], Any]]  # spec, name, mode, block_t -> f(case)
    reason: Callable[[str, Any], str | None]  # why an implementation cannot do a spec on this machine
    chosen: Callable[[Any], str]  # the implementation that `implementation=None` takes
    cost: Callable[[Any, Mode, int | None], Cost]
    resize: Callable[[Any, int | None, int | None], Any]  # spec, tokens, width -> spec
    foreign: Mapping[str, Callable[[Any, Mode, int], "Sample"]]  # other libraries: case, mode, repeats -> Sample
    static: Callable[[str], list["StaticRow"]] | None = None  # topology -> what the TPU compiler makes of its kernels


class StaticRow(NamedTuple):
    """One kernel's schedule on a TPU of which only the compiler is there; per token and head."""

    kernel: str
    bundles: float
    spills: float
    nanoseconds: float  # the bundles at the chip's clock: a lower bound of the time
    bound_nanoseconds: float  # by arithmetic and memory bandwidth, whichever takes longer


class Sample(NamedTuple):
    """The measured times of one function."""

    seconds: list[float]
    clock: str  # "host", "profiler", "CUDA events"
    compile_seconds: float | None
    memory: int | None  # bytes on the device: arguments, results and temporaries


class Measurement(NamedTuple):
    """One row of a benchmark."""

    op: str
    shape: str
    mode: str
    implementation: str
    chosen: bool  # it is what `implementation=None` takes
    seconds: float  # median
    fastest: float
    spread: float  # half the distance between the quartiles, over the median
    repeats: int
    clock: str
    compile_seconds: float | None
    memory: int | None  # bytes
    tokens: int
    token_heads: int
    flops: float
    bytes: float
    compute_seconds: float | None  # least time by the chip's peak; None where it is not known
    memory_seconds: float | None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What identifies the row in another run."""
        return self.op, self.shape, self.mode, self.implementation

    @property
    def ns_per_token_head(self) -> float:
        return self.seconds / self.token_heads * 1e9

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.seconds

    @property
    def of_compute(self) -> float | None:
        """The share of the chip's arithmetic peak that was reached."""
        return None if self.compute_seconds is None else self.compute_seconds / self.seconds

    @property
    def of_bandwidth(self) -> float | None:
        """The share of the chip's memory bandwidth that was reached."""
        return None if self.memory_seconds is None else self.memory_seconds / self.seconds


def measure(
    op: Op,
    shape: str,
    mode: Mode,
    implementations: tuple[str, ...],
    chip: Chip | None,
    *,
    spec: Any = None,
    block_t: int | None = None,
    repeats: int = 21,
    seconds: float = 10.0,
) -> list[Measurement]:
    """Time the implementations in turns on one shape.

    Args:
        op: the operation.
        shape: a name in `op.specs`, or any name if `spec` is given.
        mode: "forward", or "forward+gradients": the outputs and the gradients of every array.
        implementations: names of `op.implementations` or `op.foreign`.
        chip: for the bounds; None leaves them out.
        spec: what is measured in the place of `op.specs[shape]`.
        block_t: tokens per tile, where the implementation has tiles; None for its own choice.
        repeats: turns.
        seconds: no further turn after three, once so much time has passed.

    Returns:
        One row per implementation, in order.
    """
    spec = op.specs[shape] if spec is None else spec
    case = op.make_case(spec)
    native = {name: op.function(spec, name, mode, block_t) for name in implementations if name not in op.foreign}
    samples = sample_side_by_side(native, case, repeats=repeats, seconds=seconds)
    for name in implementations:
        if name in op.foreign:
            samples[name] = op.foreign[name](case, mode, repeats)
    cost, chosen = op.cost(spec, mode, block_t), op.chosen(spec)
    return [_row(op.name, shape, mode, name, name == chosen, samples[name], cost, chip) for name in implementations]


def _row(op: str, shape: str, mode: str, name: str, chosen: bool, sample: Sample, cost: Cost, chip: Chip | None):
    low, median, high = np.quantile(sample.seconds, [0.25, 0.5, 0.75])
    return Measurement(
        op=op,
        shape=shape,
        mode=mode,
        implementation=name,
        chosen=chosen,
        seconds=float(median),
        fastest=min(sample.seconds),
        spread=float((high - low) / 2 / median),
        repeats=len(sample.seconds),
        clock=sample.clock,
        compile_seconds=sample.compile_seconds,
        memory=sample.memory,
        tokens=cost.tokens,
        token_heads=cost.token_heads,
        flops=cost.flops,
        bytes=cost.bytes,
        compute_seconds=None if chip is None else chip.compute_seconds(cost.flops, cost.dtype),
        memory_seconds=None if chip is None else chip.memory_seconds(cost.bytes),
    )


def sample_side_by_side(
    functions: Mapping[str, Callable[[Any], Any]],
    case: Any,
    *,
    repeats: int,
    seconds: float = float("inf"),
    settle: float = 0.05,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Sample]:
    """Compile each function and time it in turns, so that a busy machine disturbs all alike.

    On a GPU or TPU the time is the device's own, from a profiler trace of each timed call; where a trace shows no
    work of a device, and on a CPU, it is the host's clock around the call and the wait for its results. Before each
    timed call come others that are not, one or more, for `settle` seconds: the function before left its memory, its
    caches and perhaps its threads behind.
    """
    programs, compile_seconds, memory = {}, {}, {}
    for name, function in functions.items():
        start = time.perf_counter()
        programs[name] = jax.jit(function).lower(case).compile()
        compile_seconds[name] = time.perf_counter() - start
        memory[name] = program_bytes(programs[name])
        jax.block_until_ready(programs[name](case))
    how = "profiler" if all(device_seconds(partial(p, case)) for p in programs.values()) else "host"

    def timed(program: Callable[[Any], Any]) -> float:
        arrived = time.perf_counter()
        jax.block_until_ready(program(case))
        while time.perf_counter() - arrived < settle:
            jax.block_until_ready(program(case))
        if how == "profiler":
            return device_seconds(partial(program, case)) or float("nan")
        start = clock()
        jax.block_until_ready(program(case))
        return clock() - start

    times: dict[str, list[float]] = {name: [] for name in programs}
    began = time.perf_counter()
    while len(times[next(iter(programs))]) < repeats:
        for name, program in programs.items():
            times[name].append(timed(program))
        if len(times[name]) >= 3 and time.perf_counter() - began > seconds:
            break
    return {n: Sample(times[n], how, compile_seconds[n], memory[n]) for n in programs}


def program_bytes(program: Any) -> int | None:
    """Arguments, results and temporaries of a compiled program, by the compiler's account."""
    stats = program.memory_analysis()
    if stats is None:
        return None
    shared = stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes - shared
