"""What the compiler makes of a training step on a mesh: bytes per device, operations, communication.

`hope shard-report` asks it of the devices that are there, or virtual ones; `hope aot` of a TPU topology that is not.
Nothing runs and no array is made.
"""

import dataclasses
import math
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from hope_jax.training.config import TrainConfig
from hope_jax.training.flops import flops_of
from hope_jax.training.packing import padding
from hope_jax.training.step import Program, build_program
from hope_jax.training.utilisation import model_flops
from hope_kernels.chips import published

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_CALL = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_ARRAY = re.compile(r"([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_WRAPPERS = ("", "while", "body", "cond", "closed_call", "checkpoint", "rematted_computation", "eval_jaxpr", "vmap()")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication of one kind in the compiled step."""

    kind: str  # "all-gather", ...
    calls: int  # places in the program, one in a loop counted once
    in_loops: int  # of them inside a loop
    bytes: int  # of their results on a device, one pass through all of them
    largest: str  # the largest result, as "f32[8,64]", and the operation of the model that it serves


@dataclasses.dataclass(frozen=True)
class StepReport:
    """A compiled step; bytes are per device.

    Attributes:
      devices: how many, and of which kind.
      params, opt_state: as they rest between steps.
      fast_state: of the memories and caches of the rows of a microbatch, divided over all devices.
      batch: tokens.
      temporary: what the step needs besides: activations, gradients, what is gathered.
      total: arguments and temporaries, results that are not donated arguments included.
      available: what a program may use; None where it is not known.
      model_flops: operations in products that the gradient of a step needs, of all devices (`utilisation.py`).
      step_flops: those of the step as it is, with recomputation, kernels and optimizer.
      collectives: by kind.
      compile_seconds: lowering and compiling.
    """

    devices: str
    params: int
    opt_state: int
    fast_state: int
    batch: int
    temporary: int
    total: int
    available: float | None
    model_flops: float
    step_flops: float
    collectives: tuple[Collective, ...]
    compile_seconds: float


def compile_step(config: TrainConfig, devices: Sequence[Any] | None = None) -> StepReport:
    """Compiles the training step of a config and reads what came out.

    Args:
      config: its mesh says how many devices.
      devices: those of a topology (`jax.experimental.topologies`); None takes the ones that are there.
    Raises:
      UserError: the mesh needs more devices than there are, or the model refuses its config.
      jax.errors.JaxRuntimeError: the compiler refuses; too little memory says how much is missing.
    """
    program = build_program(config, devices)
    tokens = abstract_batch(config, program)
    first = program.mesh.devices.flat[0]
    began = time.perf_counter()
    with jax.default_device(first):  # kernels ask for the chip they are compiled for
        compiled = program.train_step.lower(program.abstract_state, tokens).compile()
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    aliased = memory.alias_size_in_bytes
    chip = published(first.device_kind)
    return StepReport(
        devices=f"{program.mesh.size} x {first.device_kind}",
        params=bytes_per_device(program.abstract_state.params),
        opt_state=bytes_per_device(program.abstract_state.opt_state),
        fast_state=fast_state_bytes(config, program),
        batch=bytes_per_device(tokens),
        temporary=memory.temp_size_in_bytes,
        total=memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - aliased,
        available=chip.memory if chip else None,
        model_flops=model_flops(config).products,
        step_flops=flops_of(program.train_step, program.abstract_state, tokens).products,
        collectives=tuple(collectives(compiled.as_text() or "")),
        compile_seconds=seconds,
    )


def abstract_batch(config: TrainConfig, program: Program) -> Any:
    """What the training step of a config reads: tokens, or a `Batch` of documents."""
    dtype = np.min_scalar_type(config.model.vocab_size - 1)
    if config.documents == "ignore":
        rows: Any = np.empty(config.seq_len + 1, dtype)
    else:
        segment = config.seq_len if config.documents == "carry" else config.segment
        rows = padding(config.seq_len, segment, dtype)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((config.batch_size, *x.shape), x.dtype, sharding=program.batch_sharding), rows
    )


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of placed shapes."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def fast_state_bytes(config: TrainConfig, program: Program) -> int:
    """Bytes on a device of the memories and caches of its rows of a microbatch, if they divide over the mesh."""
    state = jax.eval_shape(
        lambda params: program.lm.init_state(params, config.microbatch), program.abstract_state.params
    )
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    return whole // program.mesh.size


def collectives(hlo: str) -> Iterator[Collective]:
    """The communication in a compiled program, by kind.

    >>> [found] = collectives('%x = f32[8,4]{1,0} all-gather(%y), metadata={op_name="jit(step)/dot"}')
    >>> found.calls, found.bytes, found.largest
    (1, 128, 'f32[8,4] of step/dot')
    """
    found: dict[str, list[tuple[int, str, bool]]] = {}
    for line in hlo.splitlines():
        if call := _CALL.search(line):
            shapes, kind, started = call.groups()
            arrays = _results(kind, _ARRAY.findall(shapes)) if started else _ARRAY.findall(shapes)
            name = op.group(1) if (op := _OP_NAME.search(line)) else "unknown"
            size = sum(map(_size, arrays))
            label = f"{arrays[-1][0]}[{arrays[-1][1]}] of {_short(name)}" if arrays else _short(name)
            found.setdefault(kind, []).append((size, label, "while/body" in name))
    for kind in sorted(found):
        calls = found[kind]
        yield Collective(
            kind,
            calls=len(calls),
            in_loops=sum(inside for _, _, inside in calls),
            bytes=sum(size for size, _, _ in calls),
            largest=max(calls)[1],
        )


def _results(kind: str, arrays: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Of the tuple of an asynchronous start, the results: it holds the operands before them and contexts behind."""
    if kind == "all-reduce":
        return arrays  # results alone
    return arrays[1:2] if kind == "collective-permute" else arrays[len(arrays) // 2 :]


def _size(array: tuple[str, str]) -> int:
    dtype, shape = array
    return _BYTES.get(dtype, 4) * math.prod(int(n) for n in shape.split(",") if n)


def _short(name: str) -> str:
    """The path of an operation without what jax wraps around it."""
    parts = [part for part in name.split("/") if part not in _WRAPPERS]
    return re.sub(r"\b\w+\(([\w.]*)\)", r"\1", "/".join([*parts[:1], *parts[1:][-2:]]))
