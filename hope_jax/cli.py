"""The command line `hope`: parsing, exit statuses and the form of errors. The commands are in `hope_jax/commands/`."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from hope_jax.commands import bench, compiled, look, online, train, use
from hope_jax.training.errors import EXIT_INTERRUPTED, RunFailed, UserError
from hope_jax.training.presets import describe_presets


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, like every other error of the command."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="hope",
        description="Train, evaluate and sample Hope language models.",
        epilog=f"presets of train:\n{describe_presets()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in (train, look, use, online, compiled, bench):
        group.add(commands)
    for name, one in commands.choices.items():
        one.set_defaults(parser=one, command=name)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the arguments; None takes the process's own.
    Returns:
      0 done, 1 a run that failed, 2 a mistake of the user, 42 preempted and saved, 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        arguments = _parse(argv)
        return arguments.function(arguments, argv)
    except (UserError, RunFailed) as error:
        return _complain(error, error.status)
    except KeyboardInterrupt:
        return _complain("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has gone; keep the interpreter from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    arguments, rest = build_parser().parse_known_args(argv)
    # argparse takes positionals in one stretch: those after an option are left over.
    bare = [word for word in rest if "=" not in word and not word.startswith("-")]
    if bare and getattr(arguments, "preset", "") is None:
        arguments.preset = bare[0]
        rest.remove(bare[0])
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    strangers = [word for word in rest if word not in overrides]
    if strangers or (rest and not hasattr(arguments, "overrides")):
        raise UserError(_stranger((strangers or rest)[0], arguments.parser))
    if overrides:
        arguments.overrides += overrides
    return arguments


def _stranger(word: str, parser: argparse.ArgumentParser) -> str:
    flags = sorted(set(re.findall(r"--[a-z][\w-]+", parser.format_usage())))
    near = difflib.get_close_matches(word.partition("=")[0], flags, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown argument {word!r}; {hint}see {parser.prog} --help"


def _complain(error: object, status: int) -> int:
    print(f"hope: {error}", file=sys.stderr)
    return status
