"""`hope train`."""

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from hope_jax.commands import Commands
from hope_jax.training.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, UserError
from hope_jax.training.invocation import command
from hope_jax.training.presets import PRESETS, describe_presets, preset

if TYPE_CHECKING:
    from hope_jax.training.config import TrainConfig

_OVERRIDES = """key=value changes the preset; a wrong key lists them all.

a run that begins from another (its momenta go on, unless start.momentum=reset; its config is kept but for key=value):
  hope train --from runs/tiny data=FILE --run runs/more
  hope train --from runs/tiny --add-level --run runs/deeper"""
_STATUS = f"""exit status:
  0 done    1 the run failed    2 a mistake in the command    130 interrupted (Ctrl-C), saved
  {EXIT_PREEMPTED} preempted (SIGTERM), saved: start the same command again, with --auto-resume

several processes: every one runs the same command; jax finds the others on a Cloud TPU pod, in a Slurm step and
under Open MPI, elsewhere set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID."""


def add(commands: Commands) -> None:
    """Adds the command."""
    train = commands.add_parser(
        "train",
        help="train a preset, for example: hope train tiny steps=1000 model.dim=96",
        epilog=f"presets of train:\n{describe_presets()}\n\n{_OVERRIDES}\n\n{_STATUS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    train.add_argument("preset", nargs="?", help="one of " + ", ".join(PRESETS) + "; none with --from")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="for example model=transformer data=FILE")
    train.add_argument("--run", type=Path, metavar="DIR", help="run directory (default: runs/PRESET)")
    train.add_argument(
        "--from", type=Path, dest="origin", metavar="RUN", help="begin from another run, with its config and parameters"
    )
    train.add_argument("--add-level", action="store_true", help="with --from: put a fast CMS level in front")
    existing = train.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run in the directory")
    existing.add_argument(
        "--auto-resume",
        action="store_true",
        help="continue the run if there is one, else start it; saves after its first step too",
    )
    existing.add_argument("--overwrite", action="store_true", help="replace the run in the directory")
    train.add_argument("--versus", metavar="MODEL", help="also train another architecture with as many parameters")
    train.add_argument("--profile", metavar="FIRST:LAST", help="write an xprof trace of these steps to RUN/profile")
    train.set_defaults(function=_train)


def _train(arguments: argparse.Namespace, argv: list[str]) -> int:
    overrides = list(arguments.overrides)
    if arguments.preset is not None and "=" in arguments.preset:
        overrides, arguments.preset = [arguments.preset, *overrides], None
    config, run_dir = _config(arguments, overrides)

    from hope_jax.training.command import run_training
    from hope_jax.training.interrupt import Stop
    from hope_jax.training.profile import parse_steps

    words = (word for word in argv if word not in ("--resume", "--auto-resume", "--overwrite"))
    again = command(*_without_profile(words), "--resume")
    stop = run_training(
        config,
        run_dir,
        resume=None if arguments.auto_resume else arguments.resume,
        overwrite=arguments.overwrite,
        versus=arguments.versus,
        profile=None if arguments.profile is None else parse_steps(arguments.profile),
        again=again,
    )
    return {Stop.NO: 0, Stop.INTERRUPTED: EXIT_INTERRUPTED, Stop.PREEMPTED: EXIT_PREEMPTED}[stop]


def _config(arguments: argparse.Namespace, overrides: list[str]) -> "tuple[TrainConfig, Path]":
    """What is trained, and the run directory."""
    there, run_dir = arguments.origin, arguments.run
    if there is None:
        if arguments.preset is None:
            raise UserError(f"give a preset, one of {', '.join(PRESETS)}, or --from RUN")
        if arguments.add_level:
            raise UserError("--add-level puts a level in front of those of another run; give that with --from RUN")
        return preset(arguments.preset, overrides), run_dir or Path("runs") / arguments.preset
    if arguments.preset is not None:
        raise UserError(f"--from {there} takes the config of that run; leave out the preset {arguments.preset}")
    if run_dir is None:
        raise UserError(f"a run that begins from {there} needs a place of its own; give it with --run DIR")

    from hope_jax.training.config import read_config
    from hope_jax.training.origin import config_from, levels_added
    from hope_jax.training.overrides import apply_overrides
    from hope_jax.training.run_dir import holds_run

    if (arguments.resume or arguments.auto_resume) and holds_run(run_dir):
        own = read_config(run_dir)  # what it began from may have changed, or be gone
        if arguments.add_level and levels_added(run_dir) == 0:
            raise UserError(f"{run_dir} began without a new level; leave out --add-level, or give another --run")
        base = dataclasses.replace(own, start=dataclasses.replace(own.start, run=str(there)))
    else:
        base = config_from(there, add_level=arguments.add_level)
    return apply_overrides(base, overrides), run_dir


def _without_profile(words: Iterable[str]) -> list[str]:
    """A continuation takes other steps than those that were traced."""
    kept, skip = [], False
    for word in words:
        if not skip and word.partition("=")[0] != "--profile":
            kept.append(word)
        skip = word == "--profile"
    return kept
