"""Device time from a trace: planes of accelerators, overlapping kernels, summary lines."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from hope_kernels.device_time import busy_seconds, device_seconds


def plane(name, **lines):
    """A profiler's plane with lines of (start, duration) in nanoseconds."""
    return SimpleNamespace(
        name=name,
        lines=[
            SimpleNamespace(name=line, events=[SimpleNamespace(start_ns=s, duration_ns=d) for s, d in events])
            for line, events in lines.items()
        ],
    )


def test_overlaps_count_once_and_gaps_not_at_all():
    gpu = plane("/device:GPU:0", **{"Stream #1": [(0, 10), (30, 10)], "Stream #2": [(5, 10), (32, 2)]})
    assert busy_seconds([gpu]) == pytest.approx(25e-9)


def test_summaries_hosts_and_other_planes_do_not_count():
    lines = {"XLA Ops": [(100, 40), (150, 5)], "XLA Modules": [(100, 1000)], "Steps": [(0, 5000)]}
    planes = [plane("/host:CPU", main=[(0, 10**6)]), plane("/device:CUSTOM:Megascale Trace", x=[(0, 10**6)])]
    assert busy_seconds(planes) is None
    assert busy_seconds([*planes, plane("/device:TPU:0", **lines)]) == pytest.approx(45e-9)


def test_the_busiest_device_counts():
    assert busy_seconds([plane("/device:GPU:0", s=[(0, 3)]), plane("/device:GPU:1", s=[(0, 7)])]) == pytest.approx(7e-9)


def test_a_cpu_has_no_device_time():
    assert device_seconds(lambda: jnp.ones(3) + 1) is None
