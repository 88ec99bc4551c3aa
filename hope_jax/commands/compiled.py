"""Compiling a training step without running it: `hope shard-report` and `hope aot`."""

import argparse
from typing import TYPE_CHECKING

from hope_jax.commands import Commands
from hope_jax.training.presets import preset

if TYPE_CHECKING:
    from hope_jax.training.config import TrainConfig


def add(commands: Commands) -> None:
    """Adds the commands."""
    shard = commands.add_parser(
        "shard-report",
        help="memory and communication of a training step on a mesh: hope shard-report tiny --mesh data=2,fsdp=2",
        description="Compiles the training step for a mesh of this machine's devices (virtual on a CPU); runs nothing.",
        allow_abbrev=False,
    )
    aot = commands.add_parser(
        "aot",
        help="the same for TPUs that are not there: hope aot 350m --topology v5e:4x4 --mesh fsdp=16",
        description="Compiles the training step for a TPU topology on any machine with the package libtpu.",
        allow_abbrev=False,
    )
    aot.add_argument(
        "--topology", required=True, metavar="NAME", help="v5e:16x16, v5p:8x4x4, v6e:16x16, tpu7x:4x4x4, ..."
    )
    aot.add_argument("--slices", type=int, default=1, metavar="N", help="slices connected by the network (default 1)")
    for parser, function in ((shard, _shard_report), (aot, _aot)):
        parser.add_argument("preset", help="see hope train --help")
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="as in hope train")
        parser.add_argument("--mesh", default="", metavar="AXIS=N,...", help="of data, fsdp, tensor, sequence")
        parser.add_argument("--json", action="store_true", help="print one line of JSON")
        parser.set_defaults(function=function)


def _on_mesh(arguments: argparse.Namespace) -> "TrainConfig":
    """The config of a preset with its overrides and `--mesh`."""
    axes = [f"mesh.{part}" for part in arguments.mesh.split(",") if part]
    return preset(arguments.preset, [*arguments.overrides, *axes])


def _shard_report(arguments: argparse.Namespace, argv: list[str]) -> int:
    del argv
    from hope_jax.training.shard_report import shard_report

    shard_report(_on_mesh(arguments), arguments.preset, as_json=arguments.json)
    return 0


def _aot(arguments: argparse.Namespace, argv: list[str]) -> int:
    del argv
    config = _on_mesh(arguments)

    from hope_jax.training.shard_report import aot_report

    aot_report(config, arguments.preset, arguments.topology, arguments.slices, as_json=arguments.json)
    return 0
