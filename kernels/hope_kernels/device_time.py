"""How long a device was busy with a call, from the profiler's trace of it."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

# Lines of a device's plane that repeat, at another scale, what other lines hold.
_SUMMARIES = ("Steps", "XLA Modules", "Framework Name Scope", "Framework Ops", "Source code", "XLA TraceMe")


def device_seconds(call: Callable[[], Any]) -> float | None:
    """Seconds in which the busiest device worked during `call()`; None if the trace shows no device's work.

    The gaps between kernels are not counted, nor is the host. On a CPU there is no device plane: None.
    """
    if jax.devices()[0].platform == "cpu":
        return None
    with tempfile.TemporaryDirectory(prefix="trace_") as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        planes = [
            plane
            for path in Path(folder).glob("**/*.xplane.pb")
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        ]
        return busy_seconds(planes)


def busy_seconds(planes: Iterable[Any]) -> float | None:
    """The longest union of event intervals among the planes of GPUs and TPUs."""
    busy = [_union(_intervals(plane)) for plane in planes if plane.name.startswith(("/device:GPU", "/device:TPU"))]
    nanoseconds = max(busy, default=0.0)
    return nanoseconds * 1e-9 if nanoseconds else None


def _intervals(plane: Any) -> list[tuple[float, float]]:
    lines = [line for line in plane.lines if not line.name.startswith(_SUMMARIES)]
    return sorted((event.start_ns, event.start_ns + event.duration_ns) for line in lines for event in line.events)


def _union(intervals: list[tuple[float, float]]) -> float:
    """Total length covered by sorted intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in intervals:
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total
