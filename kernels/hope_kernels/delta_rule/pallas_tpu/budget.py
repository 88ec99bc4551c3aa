"""What the compiler makes of the kernels on every chip, and the committed record that a change is held against.

    python -m hope_kernels.delta_rule.pallas_tpu.budget            # a table of what is compiled now
    python -m hope_kernels.delta_rule.pallas_tpu.budget --write    # and keep it as the budget

Everything here is static, see `hope_kernels.aot`: 16 heads of 128 by 128 in bfloat16, precision "default" unless named.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hope_kernels.aot import Job, Report, reports
from hope_kernels.delta_rule.config import Config, tpu_sizes
from hope_kernels.delta_rule.pallas_tpu import backward_kernel, forward, forward_kernel
from hope_kernels.delta_rule.types import Inputs, State

PATH = Path(__file__).with_name("budgets.json")
TOPOLOGIES = {"v5e:2x2": "TPU v5 lite", "v5p:2x2x1": "TPU v5", "v6e:2x2": "TPU v6 lite", "tpu7x:2x2x1": "TPU7x"}
KERNELS = ("forward", "forward_kept", "backward", "backward_fast")
HEADS, WIDTH, TOKENS = 16, 128, 512


def reads_and_state(precision: str, inputs: Inputs, start: jax.Array) -> Any:
    """The forward kernel without a gradient: nothing is kept."""
    return forward(inputs, State(start, None), read="after", config=Config(), precision=precision)


def with_gradient(precision: str, inputs: Inputs, start: jax.Array, dy: jax.Array, d_end: jax.Array) -> Any:
    """Both kernels."""
    out, pullback = jax.vjp(partial(reads_and_state, precision), inputs, start)
    return out, pullback((dy, State(d_end, None)))


def arguments(batch: int = 1, heads: int = HEADS, tokens: int = TOKENS) -> tuple[Inputs, Any, Any, Any]:
    """Shapes of inputs, initial state and the two cotangents."""
    x: Any = jax.ShapeDtypeStruct((batch, tokens, heads, WIDTH), jnp.bfloat16)
    gate: Any = jax.ShapeDtypeStruct((batch, tokens, heads), jnp.float32)
    state = jax.ShapeDtypeStruct((batch, heads, WIDTH, WIDTH), jnp.float32)
    inputs = Inputs(q=x, k=x, u=x, eta=gate, log_alpha=gate, log_mu=None, mask=None, reset=None)
    return inputs, state, x, state


def job(topology: str, kernel: str) -> Job:
    """What compiles `kernel` for one chip of `topology`."""
    given = arguments()
    if kernel == "forward":
        return Job(topology, partial(reads_and_state, "default"), given[:2], forward_kernel.NAME, profile=False)
    name = forward_kernel.NAME if kernel == "forward_kept" else backward_kernel.NAME
    precision = "fast" if kernel == "backward_fast" else "default"
    return Job(topology, partial(with_gradient, precision), given, name, profile=False)


def jobs(topology: str, kernels: Sequence[str]) -> list[Job]:
    """Those of several kernels."""
    return [job(topology, kernel) for kernel in kernels]


def measure(topology: str, kernels: tuple[str, ...] = KERNELS) -> dict[str, dict[str, float]]:
    """By kernel: bundles, spills and nanoseconds, each per token and head."""
    sizes = tpu_sizes(TOPOLOGIES[topology], TOKENS, Config())
    token_heads = sizes.block_t * min(sizes.heads, HEADS)

    def row(report: Report) -> dict[str, float]:
        counts = {"bundles": report.bundles, "spills": report.spills, "nanoseconds": report.nanoseconds}
        return {name: round(count / token_heads, 3) for name, count in counts.items()}

    return dict(zip(kernels, map(row, reports(jobs, topology, kernels)), strict=True))


def committed() -> dict[str, dict[str, dict[str, float]]]:
    """The budget: topology -> kernel -> figures."""
    return json.loads(PATH.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep what was measured as the budget")
    parser.add_argument("--topology", choices=list(TOPOLOGIES), help="only this one")
    options = parser.parse_args()
    found = committed() if PATH.exists() else {}
    for topology in [options.topology] if options.topology else TOPOLOGIES:
        found[topology] = measure(topology)
        for kernel, row in found[topology].items():
            print(f"{topology:12} {kernel:14}", *(f"{n} {x:7.3f}" for n, x in row.items()), flush=True)
    if options.write:
        PATH.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    from hope_kernels.delta_rule.pallas_tpu import budget  # functions that the compiling process can import

    budget.main()
