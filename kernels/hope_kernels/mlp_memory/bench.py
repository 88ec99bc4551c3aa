"""How fast the MLP memory is: the reference, and the chunked form with several groups, forward and with gradients.

    python -m hope_kernels.mlp_memory.bench [--spec layer ...] [--repeats 9] [--json FILE]

The base of the ratios is the chunked form that keeps every chunk's state. With the times, the temporaries that the
compiler counts for the gradient.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from hope_kernels.benchmarking import Timing, machine_line, table, time_side_by_side, write_json
from hope_kernels.mlp_memory.api import mlp_memory
from hope_kernels.mlp_memory.arg_specs import ARG_SPECS, TITANS, make_arguments

BASE = "xla, group 1"
VARIANTS: dict[str, dict[str, Any]] = {
    "reference": {"implementation": "reference"},
    BASE: {"implementation": "xla", "group": 1},
    "xla, group 4": {"implementation": "xla", "group": 4},
    "xla, default group": {"implementation": "xla"},
}


def run(specs: Sequence[str], repeats: int) -> list[Timing]:
    """Timings of every variant on every named shape."""
    timings = []
    for name in specs:
        arguments = make_arguments(ARG_SPECS[name])
        chunk_size = ARG_SPECS[name].chunk_size
        forward = {
            v: partial(_forward, {**TITANS, **options, "chunk_size": chunk_size}) for v, options in VARIANTS.items()
        }
        gradients = {v: partial(_gradients, f) for v, f in forward.items()}
        for variant, f in gradients.items():
            program: Any = jax.jit(f).lower(arguments).compile()
            size = program.memory_analysis().temp_size_in_bytes
            print(f"{name}, {variant}: {size / 2**20:.1f} MiB of temporaries for the gradient")
        for mode, functions in {"forward": forward, "forward+gradients": gradients}.items():
            timings += time_side_by_side(functions, arguments, case=f"{name} {mode}", base=BASE, repeats=repeats)
    return timings


def _forward(options: dict[str, Any], arguments: dict[str, Any]) -> Any:
    return mlp_memory(**arguments, **options)


def _gradients(forward: Any, arguments: dict[str, Any]) -> Any:
    def loss(arguments):
        return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(forward(arguments)))

    return jax.grad(loss)(arguments)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spec", nargs="+", choices=list(ARG_SPECS), default=list(ARG_SPECS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", help="also write machine and timings to this file")
    options = parser.parse_args(argv)
    print(machine_line())
    timings = run(options.spec, options.repeats)
    print(table(timings))
    if options.json:
        write_json(options.json, timings)


if __name__ == "__main__":
    main()
