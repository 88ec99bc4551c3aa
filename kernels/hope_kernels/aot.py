"""Compile for a TPU on a machine without one, and read the compiler's own schedule.

libtpu compiles for a named topology on any machine, and writes down what it made of each kernel: the final bundles (one
bundle is what the core issues in one cycle), the units every bundle uses, the registers spilled to memory, and an
estimate of the cycles. `report` does that for one job, `reports` for several in one process:

    def job(topology):
        return Job(topology, function, (jax.ShapeDtypeStruct((8, 4096, 2048), "bfloat16"),), kernel="my_kernel")

    print(report(job, "v6e:2x2").nanoseconds)

The compilation runs in a process of its own: libtpu reads the flags that make it write its dumps only once, when it is
loaded, and its static profiler aborts the process on some programs (such a job is compiled again without it, and
`cycles` is None). Therefore what makes the jobs, `job` above, must be a function of a module, and its arguments JSON:
the other process makes the same jobs again.

What the numbers are: static. They count what is issued and not what is waited for, so they are a lower bound of the
time (1.2 to 2 times longer on a chip is usual). They rank variants and show spills.
"""

import glob
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from hope_kernels import child

# Cycles per nanosecond of one core, from the published peak: peak / (MXUs x multiply-adds per cycle x 2).
CLOCK_GHZ = {"v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2}
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


class Job(NamedTuple):
    """A function to compile for one chip of a topology, or with `mesh` for several of them."""

    topology: str  # "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", "v5e:4x4", ...
    function: Callable[..., Any]  # with `mesh` it is called with the mesh as its first argument
    arguments: Sequence[Any]  # a pytree of ShapeDtypeStruct per argument
    kernel: str = ""  # which Pallas kernel to report, by the `name` of its `pallas_call`; "" for the last one compiled
    mesh: Mapping[str, int] | None = None  # axis sizes by name; None compiles for a single chip
    specs: Sequence[Any] = ()  # with `mesh`: a PartitionSpec per argument, for all its leaves
    profile: bool = True  # ask for the estimate of cycles
    dump: str | None = None  # keep the compiler's dumps in this folder


class Report(NamedTuple):
    """What the compiler made of a job. Counts are of one core and of one pass through the kernel's code."""

    bundles: int  # instructions of the kernel; one iteration of the grid where the kernel has no loop of its own
    spills: int  # vector registers stored because there are not enough of them
    fills: int  # and loaded again
    use: dict[str, float]  # unit -> issue slots used / slots there are
    cycles: int | None  # of the whole kernel, all its iterations, copies awaited; None where the static profiler fails
    nanoseconds: float  # of one pass: the bundles at the chip's clock
    memory: dict[str, int]  # bytes on the device: "arguments", "outputs", "temporary", "code"
    compile_seconds: float  # lowering and compiling
    text: str  # the compiled program


def report(build: Callable[..., Job], *arguments: Any) -> Report:
    """Compile the job that `build(*arguments)` returns and read its schedule.

    Args:
        build: a function of a module.
        *arguments: for it, JSON.

    Raises:
        RuntimeError: it does not compile, or has no kernel called `job.kernel`; the message holds the compiler's.
        ValueError: `build` cannot be imported by another process.

    Example:
        report(job, "v6e:2x2")  # with `job` as at the top of this module
    """
    return reports(build, *arguments)[0]


def reports(build: Callable[..., Job | Sequence[Job]], *arguments: Any) -> list[Report]:
    """One report for each of several jobs, in order, compiled one after another in one process."""
    jobs = _jobs(build, arguments)
    profile = [job.profile for job in jobs]
    found: list[Report] = []
    while len(found) < len(jobs):
        first = last = len(found)
        while last < len(jobs) and profile[last] == profile[first]:
            last += 1
        answers, ended = _compile_in_child(build, arguments, list(range(first, last)), profile[first])
        for answer in answers:
            if "error" in answer:
                raise RuntimeError(f"{_describe(jobs[len(found)])} does not compile:\n{answer['error']}")
            found.append(Report(**answer))
        if ended and len(found) < len(jobs):  # the process died on the next one
            if not profile[len(found)]:
                raise RuntimeError(f"{_describe(jobs[len(found)])}: the compiler ended with {ended}")
            profile[len(found)] = False
    return found


def _jobs(build: Callable[..., Job | Sequence[Job]], arguments: Sequence[Any]) -> list[Job]:
    made = build(*arguments)
    return [made] if isinstance(made, Job) else list(made)


def mesh(topology: str, axes: Mapping[str, int]) -> Any:
    """A `jax.sharding.Mesh` over the devices of a topology; needs the variables of `ENVIRONMENT`."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    sizes = tuple(axes.values())
    if np.prod(sizes) != len(devices):
        raise ValueError(f"{topology} has {len(devices)} devices; the mesh {dict(axes)} has {int(np.prod(sizes))}")
    return Mesh(np.array(devices).reshape(sizes), tuple(axes))


def _describe(job: Job) -> str:
    return f"{job.kernel or 'the program'} for {job.topology}"


def _compile_in_child(
    build: Callable[..., Any], arguments: Sequence[Any], numbers: list[int], profile: bool
) -> tuple[list[dict[str, Any]], str]:
    """The answers to the jobs with these numbers until the process ended, and how it ended; "" is well."""
    with tempfile.TemporaryDirectory(prefix="aot_") as folder:
        flags = f"--xla_jf_dump_to={folder}/llo --xla_jf_dump_llo_text=true"
        if profile:
            flags += f" --xla_jf_dump_static_llo_profile_to={folder}/profile"
        environment = {**ENVIRONMENT, "LIBTPU_INIT_ARGS": flags}
        work = {"arguments": list(arguments), "numbers": numbers, "profile": profile}
        ended = child.run("hope_kernels.aot", folder, build, work, environment)
        answers = []
        for path in sorted(glob.glob(f"{folder}/answer*")):
            with open(path) as file:
                answers.append(json.load(file))
    if ended.returncode == 0:
        return answers, ""
    how = signal.Signals(-ended.returncode).name if ended.returncode < 0 else f"code {ended.returncode}"
    if ended.returncode > 0 and not answers:
        how += f":\n{ended.stderr[-4000:]}"
    return answers, how


def _child(folder: str, build: Callable[..., Any], work: dict[str, Any]) -> None:
    """Compile some of the jobs, leaving one answer after another in the folder."""
    jobs = _jobs(build, work["arguments"])
    for number in work["numbers"]:
        try:
            answer = _compile(jobs[number]._replace(profile=work["profile"]), folder)._asdict()
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        with open(f"{folder}/partial", "w") as file:
            json.dump(answer, file)
        os.replace(f"{folder}/partial", f"{folder}/answer{number:04d}")
        if "error" in answer:
            break


def _compile(job: Job, folder: str) -> Report:
    import shutil
    from functools import partial

    import jax
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, SingleDeviceSharding

    for name in ("llo", "profile"):
        shutil.rmtree(f"{folder}/{name}", ignore_errors=True)
        os.makedirs(f"{folder}/{name}")
    if job.mesh is None:
        device = topologies.get_topology_desc(topology_name=job.topology, platform="tpu").devices[0]
        shardings: list[Any] = [SingleDeviceSharding(device)] * len(job.arguments)
        function = job.function
    else:
        chips = mesh(job.topology, job.mesh)
        device = chips.devices.flat[0]
        shardings = [NamedSharding(chips, spec) for spec in job.specs]
        function = partial(job.function, chips)
    arguments = [
        jax.tree.map(lambda x, s=sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), argument)
        for argument, sharding in zip(job.arguments, shardings, strict=True)
    ]
    start = time.perf_counter()
    with jax.default_device(device):  # lowering rules that ask for the chip's figures see the target
        compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    bundles, use, counts = _read_bundles(f"{folder}/llo", job.kernel)
    cycles = _read_cycles(f"{folder}/profile", job.kernel) if job.profile else None
    if job.dump:
        shutil.copytree(f"{folder}/llo", job.dump, dirs_exist_ok=True)
    memory: Any = compiled.memory_analysis()
    return Report(
        bundles=bundles,
        spills=counts.get("VSTORE:SPILL", 0),
        fills=counts.get("VLOAD:FILL", 0),
        use=use,
        cycles=cycles,
        nanoseconds=bundles / CLOCK_GHZ[job.topology.split(":")[0]],
        memory={
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
        },
        compile_seconds=seconds,
        text=compiled.as_text() or "",
    )


def _read_bundles(folder: str, kernel: str) -> tuple[int, dict[str, float], dict[str, int]]:
    """Bundles, share of the slots used per unit, and slots used per unit, of the kernel whose name is `kernel`."""
    paths = sorted(glob.glob(f"{folder}/*final_hlo-static-per-bundle-utilization.txt"))
    name = re.compile(rf"-{_pattern(kernel)}-\d")
    paths = [p for p in paths if not kernel or name.search(os.path.basename(p))]
    if not paths:
        raise LookupError(f"no kernel called {kernel!r} was compiled")
    with open(paths[-1]) as file:
        head, _, table = file.read().partition("== UTILIZATION:")
    names, capacities = head.splitlines()[1:3]
    units = [name.strip() for name in names.split(",")]
    rows = [[int(n) for n in line.split()] for line in table.splitlines() if line.strip()]
    counts = {unit: sum(row[i] for row in rows) for i, unit in enumerate(units)}
    slots = dict(zip(units, map(int, capacities.split()), strict=True))
    return len(rows), {unit: counts[unit] / (slots[unit] * len(rows)) for unit in units}, counts


def _pattern(kernel: str) -> str:
    """How XLA writes a kernel's name: numbered, and inside the transformations it was traced under."""
    return rf"(\w+_)?{re.escape(kernel)}_*(\.\d+)?"


def _read_cycles(folder: str, kernel: str) -> int | None:
    """The static profiler's estimate; it writes 0 for some grids, which is as good as none."""
    total = 0
    for path in glob.glob(f"{folder}/*.textproto"):
        with open(path) as file:
            estimates = re.findall(r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)', file.read())
        total += sum(int(n) for name, n in estimates if not kernel or re.fullmatch(_pattern(kernel), name))
    return total or None


if __name__ == "__main__":
    from hope_kernels import aot  # the module that the jobs are made with; this one is called __main__

    aot._child(*child.described(sys.argv))
