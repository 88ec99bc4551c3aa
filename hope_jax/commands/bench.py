"""`hope bench`."""

import argparse
from pathlib import Path

from hope_jax.commands import Commands
from hope_jax.training.invocation import command

_BENCH_EXAMPLES = """examples:
  hope bench kernels                                       the default shapes of this device
  hope bench kernels --shape short --json now.json         one shape, kept for later
  hope bench kernels --shape short --compare now.json      how much faster than then
  hope bench kernels --shape short --plot kernels.png      sweeps and a roofline
  hope bench kernels --static v6e                          on a machine without a TPU
"""


def add(commands: Commands) -> None:
    """Adds the command."""
    bench = commands.add_parser(
        "bench",
        help="measure the kernels on this machine: hope bench kernels",
        description="Times the kernels side by side on named shapes; without options, on shapes that suit this device.",
        epilog=_BENCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    bench.add_argument("what", choices=["kernels"], help="what is measured")
    bench.add_argument("--list", action="store_true", help="only list the operations, shapes and implementations")
    bench.add_argument("--op", nargs="+", default=[], metavar="NAME", help="operations (default: all)")
    bench.add_argument("--shape", nargs="+", default=[], metavar="NAME", help="shapes (default: by device, see --list)")
    bench.add_argument("--impl", nargs="+", default=[], metavar="NAME", help="implementations (default: all that can)")
    bench.add_argument(
        "--mode", nargs="+", default=[], metavar="NAME", help="forward, forward+gradients (default: both)"
    )
    bench.add_argument(
        "--block-t", type=int, metavar="N", help="tokens per tile (default: the implementation's choice)"
    )
    bench.add_argument("--repeats", type=int, default=21, metavar="N", help="turns, fewer if slow (default 21)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements")
    bench.add_argument("--compare", type=Path, metavar="FILE", help="ratios to a former run, written with --json")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="a PNG: time by T, K and tile, and the roofline")
    bench.add_argument(
        "--static", metavar="CHIP", help="without a TPU: the compiler's figures for v5e, v5p, v6e, tpu7x"
    )
    bench.set_defaults(function=_bench)


def _bench(arguments: argparse.Namespace, argv: list[str]) -> int:
    from hope_jax.bench.command import Request, run

    request = Request(
        ops=arguments.op,
        shapes=arguments.shape,
        implementations=arguments.impl,
        modes=arguments.mode,
        block_t=arguments.block_t,
        repeats=arguments.repeats,
        json=arguments.json,
        compare=arguments.compare,
        plot=arguments.plot,
        static=arguments.static,
        listing=arguments.list,
    )
    run(request, command(*argv))
    return 0
