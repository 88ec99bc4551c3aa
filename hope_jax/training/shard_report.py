"""`hope shard-report` and `hope aot`: a compiled training step as tables, before anybody pays for the devices."""

import contextlib
import dataclasses
import json
import math
import os
from typing import Any

from rich.console import Console
from rich.table import Table

from hope_jax.training.config import TrainConfig
from hope_jax.training.errors import RunFailed, UserError
from hope_jax.training.overrides import one_line
from hope_kernels.aot import ENVIRONMENT


def shard_report(config: TrainConfig, title: str, *, as_json: bool = False) -> None:
    """Compiles the step for the devices of this machine (virtual ones on a CPU) and prints what came out."""
    import jax

    with contextlib.suppress(RuntimeError):  # jax has begun already: it has the devices it has
        jax.config.update("jax_num_cpu_devices", config.mesh.size)
    _show(config, title, None, as_json)


def aot_report(config: TrainConfig, title: str, topology: str, slices: int = 1, *, as_json: bool = False) -> None:
    """Compiles the step for a TPU topology that is not there and prints what came out; needs `libtpu`.

    Raises:
      UserError: no such topology, no libtpu, or the mesh needs another number of devices.
      RunFailed: the compiler refuses, for example for want of memory.
    """
    import jax

    os.environ.update(ENVIRONMENT)  # before the TPU compiler is loaded
    jax.config.update("jax_platforms", "cpu")  # a machine that has accelerators leaves them alone
    if slices < 1:
        raise UserError(f"--slices {slices} must be at least 1")
    devices = topology_devices(topology, slices)
    if config.mesh.size != len(devices):
        raise UserError(
            f"{topology}{f' x {slices}' if slices > 1 else ''} has {len(devices)} devices, the mesh "
            f"{config.mesh.describe()} needs {config.mesh.size}; give --mesh axes whose product is {len(devices)}"
        )
    _show(config, f"{title} on {topology}", devices, as_json)


def topology_devices(topology: str, slices: int = 1) -> list[Any]:
    """The devices of a topology such as "v5e:16x16", "v5p:8x4x4", "v6e:16x16" or "tpu7x:4x4x4".

    Raises:
      UserError: there is no such topology, or the package libtpu is missing.
    """
    from jax.experimental import topologies

    options = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(topology_name=topology, platform="tpu", **options).devices)
    except Exception as error:
        hint = "examples are v5e:16x16, v5p:8x4x4, v6e:16x16 and tpu7x:4x4x4; the compiler is the package libtpu"
        raise UserError(f"no topology {topology!r} ({one_line(error)}); {hint}") from error


def _show(config: TrainConfig, title: str, devices: Any, as_json: bool) -> None:
    import jax

    from hope_jax.training.compiled import compile_step

    try:
        report = compile_step(config, devices)
    except jax.errors.JaxRuntimeError as error:
        raise RunFailed(f"the step does not compile on {config.mesh.describe()}: {_first_lines(error)}") from error
    if as_json:
        print(json.dumps(dataclasses.asdict(report)))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(_memory(report, f"{title}: {config.mesh.describe()}, {report.devices}"))
    console.print(_communication(report))
    share = report.model_flops / report.step_flops if report.step_flops else math.nan
    console.print(
        f"{report.model_flops / 1e12:,.3f} TFLOP of matrix products a step without recomputation ({share:.0%} of what "
        f"is done), {config.batch_size * config.seq_len:,} tokens; compiled in {report.compile_seconds:.0f} s"
    )


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split("\n")[:3])


def _memory(report: Any, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("on each device")
    table.add_column("MiB", justify="right")
    rows = {
        "parameters": report.params,
        "optimizer and level states": report.opt_state,
        "tokens": report.batch,
        "temporary: activations, gradients, memories": report.temporary,
        "the memories' states among them, once": report.fast_state,
        "together": report.total,
    }
    for name, size in rows.items():
        table.add_row(name, f"{size / 2**20:,.2f}")
    if report.available:
        table.add_row("available", f"{report.available / 2**20:,.0f} ({report.total / report.available:.0%} used)")
    return table


def _communication(report: Any) -> Table:
    table = Table(title="communication in the compiled step (a loop's body counted once)", title_justify="left")
    for column in ("", "calls", "in loops", "MiB of results", "largest"):
        table.add_column(column, justify="left" if column in ("", "largest") else "right", overflow="fold")
    for found in report.collectives:
        table.add_row(found.kind, str(found.calls), str(found.in_loops), f"{found.bytes / 2**20:,.2f}", found.largest)
    if not report.collectives:
        table.add_row("none", "0", "0", "0.00", "")
    return table
