"""`hope train`."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from hope_jax.commands import Commands
from hope_jax.training.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED
from hope_jax.training.invocation import command
from hope_jax.training.presets import PRESETS, describe_presets, preset

_OVERRIDES = "key=value changes the preset; a wrong key lists them all."
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
    train.add_argument("preset", help="one of " + ", ".join(PRESETS))
    train.add_argument("overrides", nargs="*", metavar="key=value", help="for example model=transformer data=FILE")
    train.add_argument("--run", type=Path, metavar="DIR", help="run directory (default: runs/PRESET)")
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
    base = preset(arguments.preset)

    from hope_jax.training.command import run_training
    from hope_jax.training.interrupt import Stop
    from hope_jax.training.overrides import apply_overrides
    from hope_jax.training.profile import parse_steps

    words = (word for word in argv if word not in ("--resume", "--auto-resume", "--overwrite"))
    again = command(*_without_profile(words), "--resume")
    stop = run_training(
        apply_overrides(base, arguments.overrides),
        arguments.run or Path("runs") / arguments.preset,
        resume=None if arguments.auto_resume else arguments.resume,
        overwrite=arguments.overwrite,
        versus=arguments.versus,
        profile=None if arguments.profile is None else parse_steps(arguments.profile),
        again=again,
    )
    return {Stop.NO: 0, Stop.INTERRUPTED: EXIT_INTERRUPTED, Stop.PREEMPTED: EXIT_PREEMPTED}[stop]


def _without_profile(words: Iterable[str]) -> list[str]:
    """A continuation takes other steps than those that were traced."""
    kept, skip = [], False
    for word in words:
        if not skip and word.partition("=")[0] != "--profile":
            kept.append(word)
        skip = word == "--profile"
    return kept
