"""How fast the delta rule is: every implementation on the named shapes, forward and forward with gradients.

    python -m hope_kernels.delta_rule.bench [--spec layer ...] [--implementation xla ...] [--json FILE]

The base of the ratios is the reference, the token loop.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from hope_kernels.benchmarking import Timing, machine_line, table, time_side_by_side, write_json
from hope_kernels.delta_rule.api import IMPLEMENTATIONS, delta_rule
from hope_kernels.delta_rule.arg_specs import ARG_SPECS, make_arguments

BASE = "reference"


def _forward(implementation: str, arguments: dict[str, Any]):
    return delta_rule(**arguments, implementation=implementation)


def _gradients(implementation: str, arguments: dict[str, Any]):
    def loss(arguments):
        out = delta_rule(**arguments, implementation=implementation)
        return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(out))

    return jax.grad(loss)(arguments)


MODES: dict[str, Callable] = {"forward": _forward, "forward+gradients": _gradients}


def run(specs: Sequence[str], implementations: Sequence[str], repeats: int) -> list[Timing]:
    """Timings of every implementation and mode on every named shape."""
    timings = []
    for spec in specs:
        arguments = make_arguments(ARG_SPECS[spec])
        for mode, function in MODES.items():
            functions = {name: partial(function, name) for name in [BASE, *implementations]}
            timings += time_side_by_side(functions, arguments, case=f"{spec} {mode}", base=BASE, repeats=repeats)
    return timings


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    others = [name for name in IMPLEMENTATIONS if name != BASE]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spec", nargs="+", choices=list(ARG_SPECS), default=list(ARG_SPECS))
    parser.add_argument("--implementation", nargs="+", choices=others, default=others)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", help="also write machine and timings to this file")
    options = parser.parse_args(argv)
    timings = run(options.spec, options.implementation, options.repeats)
    print(machine_line())
    print(table(timings))
    if options.json:
        write_json(options.json, timings)


if __name__ == "__main__":
    main()
