"""Timing implementations side by side: one process, interleaved repeats, medians, one table."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np


class Timing(NamedTuple):
    """Seconds per call of one implementation on one case."""

    case: str
    implementation: str
    median: float
    fastest: float
    base: str  # the implementation it is compared with
    ratio: float  # median of the base over this median: how many times faster


def machine_line() -> str:
    """What the numbers were measured on, in one line; no host name."""
    device = jax.devices()[0]
    name = _cpu_name() if device.platform == "cpu" else device.device_kind
    return (
        f"{device.platform}: {name}, {os.cpu_count()} CPUs, jax {jax.__version__}, Python {platform.python_version()}"
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def time_side_by_side(
    functions: Mapping[str, Callable[..., Any]],
    arguments: Any,
    *,
    case: str,
    base: str,
    repeats: int = 9,
    compiled: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time `f(arguments)` for each function, taking turns so that a busy machine disturbs all alike.

    Args:
        functions: by the name of the implementation.
        arguments: one pytree, passed to each.
        case: what is being timed, for the table.
        base: the name in `functions` that the ratios compare with.
        repeats: timed calls of each, one in every turn, right after an untimed one.
        compiled: jit the functions; False for those that call compiled programs themselves.
        clock: seconds.

    Returns:
        One Timing per function, in order.
    """
    if base not in functions:
        raise ValueError(f"base must be one of {', '.join(functions)}; got {base!r}")
    jitted = {name: jax.jit(f) for name, f in functions.items()} if compiled else dict(functions)
    for f in jitted.values():
        jax.block_until_ready(f(arguments))
    seconds: dict[str, list[float]] = {name: [] for name in jitted}
    for _ in range(repeats):
        for name, f in jitted.items():
            # One call to settle in: the one before left its own memory and caches behind.
            jax.block_until_ready(f(arguments))
            start = clock()
            jax.block_until_ready(f(arguments))
            seconds[name].append(clock() - start)
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    return [
        Timing(case, name, median[name], min(seconds[name]), base, median[base] / median[name]) for name in functions
    ]


def table(timings: list[Timing]) -> str:
    """The timings as text, one row each."""
    header = ("case", "implementation", "median ms", "fastest ms", "times faster")
    rows = [
        (
            t.case,
            t.implementation,
            f"{t.median * 1e3:.2f}",
            f"{t.fastest * 1e3:.2f}",
            "" if t.implementation == t.base else f"{t.ratio:.1f} than {t.base}",
        )
        for t in timings
    ]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    )


def write_json(path: str | Path, timings: list[Timing]) -> None:
    """Machine and timings, for comparing runs."""
    record = {"machine": machine_line(), "timings": [t._asdict() for t in timings]}
    Path(path).write_text(json.dumps(record, indent=2) + "\n")
