"""Compile Mosaic GPU kernels for a Hopper GPU on a machine without one, and read what the assembler says.

    def case(tokens):
        return function, (jax.ShapeDtypeStruct((1, tokens, 1, 64), "bfloat16"),)

    figures = report(case, 128)
    figures["my_kernel"].spilled_bytes

jax's CUDA plugin (`jax[cuda13]`) brings the compiler and the assembler; no driver is needed. The compilation runs in a
process of its own, because the variables that make it write its dumps are read once; so `case` must be a function of
a module and its arguments JSON. The figures are static: nothing was run.
"""

import importlib.util
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hope_kernels import child

# What the compiler has to know about the chip: public figures of an H100 SXM.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 patch: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  clock_rate_ghz: 1.98
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
}
"""


class Figures(NamedTuple):
    """What became of one kernel."""

    registers: int  # per thread at launch; warpgroups exchange them afterwards
    spilled_bytes: int  # stored to and loaded from local memory, per thread
    stack_bytes: int  # per thread
    wgmma: int  # tensor-core instructions in the code, loops counted once
    copies: int  # TMA copies in the code, loops counted once
    shared_bytes: int  # per block


def available() -> bool:
    """Whether jax's CUDA plugin is installed."""
    return importlib.util.find_spec("jax_cuda13_plugin") is not None


def report(build: Callable[..., tuple[Callable[..., Any], Sequence[Any]]], *arguments: Any) -> dict[str, Figures]:
    """Compile a function for an H100 and return the figures of its kernels by name.

    Args:
        build: a function of a module; `build(*arguments)` returns the function and its arguments' shapes.
        *arguments: for it, JSON.

    Raises:
        RuntimeError: it does not compile; the message holds the compiler's.
        ValueError: `build` cannot be imported by another process.
    """
    with tempfile.TemporaryDirectory(prefix="aot_gpu_") as folder:
        environment = {
            "JAX_PLATFORMS": "cpu",
            "MOSAIC_GPU_DUMP_TO": folder,
            "MOSAIC_GPU_DUMP_PTX": "1",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
        }
        ended = child.run("hope_kernels.aot_gpu", folder, build, list(arguments), environment)
        if ended.returncode:
            raise RuntimeError(f"it does not compile for an H100:\n{ended.stderr[-4000:]}")
        found = {}
        for path in sorted(Path(folder).glob("*.ptxas")):
            found[re.sub(r"_\d+$", "", path.stem)] = _read(path)
    return found


def _read(path: Path) -> Figures:
    """The assembler's report at `path` and the code beside it."""
    text, code = path.read_text(), path.with_suffix(".ptx").read_text()
    resources = path.with_name(f"{path.stem}.resources.txt").read_text()
    stack, stores, loads = map(
        int, re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)[0]
    )
    return Figures(
        registers=int(re.findall(r"Used (\d+) registers", text)[0]),
        spilled_bytes=stores + loads,
        stack_bytes=stack,
        wgmma=code.count("wgmma.mma_async"),
        copies=code.count("cp.async.bulk.tensor"),
        shared_bytes=int(re.findall(r"smem_scratch_bytes=(\d+)", resources)[0]),
    )


def _child(build: Callable[..., Any], given: Sequence[Any]) -> None:
    import jax
    from jax.experimental import topologies

    function, arguments = build(*given)
    device = topologies.get_topology_desc("", platform="cuda", topology="1x1x1", target_config=H100).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    with jax.default_device(device):
        jax.jit(function).trace(*placed).lower(lowering_platforms=("cuda",)).compile()


if __name__ == "__main__":
    _child(*child.described(sys.argv)[1:])
