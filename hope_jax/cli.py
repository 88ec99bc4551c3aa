"""The command line: `hope train`, `hope eval`, `hope generate`, `hope bench`.

Only the parsing lives here; each command imports what it needs when it runs, so that help and mistakes answer
at once.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hope_jax.training.errors import RunFailed, UserError
from hope_jax.training.invocation import command
from hope_jax.training.presets import PRESETS, describe_presets, preset

EXIT_PREEMPTED = 42
EXIT_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, like every other error of the command."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    presets = f"presets of train:\n{describe_presets()}"
    parser = _Parser(
        prog="hope",
        description="Train, evaluate and sample byte-level Hope language models.",
        epilog=presets,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,eval,generate,bench}")

    train = commands.add_parser(
        "train",
        help="train a preset, for example: hope train tiny steps=1000 model.dim=96",
        epilog=f"{presets}\n\nkey=value changes the preset; a wrong key lists them all.\n\n{_TRAIN_PROCESSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    train.add_argument("preset", help="one of " + ", ".join(PRESETS))
    train.add_argument("overrides", nargs="*", metavar="key=value", help="for example model=transformer data=FILE")
    train.add_argument("--run", type=Path, metavar="DIR", help="run directory (default: runs/PRESET)")
    existing = train.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run in the directory")
    existing.add_argument("--auto-resume", action="store_true", help="continue the run if there is one, else start it")
    existing.add_argument("--overwrite", action="store_true", help="replace the run in the directory")
    train.add_argument("--versus", metavar="MODEL", help="also train another architecture with as many parameters")
    train.set_defaults(function=_train)

    evaluate = commands.add_parser("eval", help="bits per byte of a run on a text file", allow_abbrev=False)
    evaluate.add_argument("run", type=Path, metavar="RUN", help="run directory, for example runs/tiny")
    evaluate.add_argument("--data", type=Path, required=True, metavar="FILE", help="a UTF-8 text file")
    evaluate.set_defaults(function=_eval)

    generate = commands.add_parser("generate", help="stream text from a run", allow_abbrev=False)
    generate.add_argument("run", type=Path, metavar="RUN", help="run directory, for example runs/tiny")
    generate.add_argument("--prompt", default="", help="text to continue (default: a new line)")
    generate.add_argument("--max-bytes", type=int, default=500, help="length of the continuation (default 500)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default 0.8)")
    generate.add_argument("--top-k", type=int, default=0, help="only the k likeliest bytes (default: all)")
    generate.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    generate.set_defaults(function=_generate)
    _add_bench(commands)
    return parser


_TRAIN_PROCESSES = f"""exit status:
  0 done    1 the run failed    2 a mistake in the command    130 interrupted (Ctrl-C), saved
  {EXIT_PREEMPTED} preempted (SIGTERM), saved: start the same command again, with --auto-resume

several processes: every one runs the same command; jax finds the others on a Cloud TPU pod, in a Slurm step and
under Open MPI, elsewhere set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID."""


def _add_bench(commands: "argparse._SubParsersAction[_Parser]") -> None:
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


_BENCH_EXAMPLES = """examples:
  hope bench kernels                                       the default shapes of this device
  hope bench kernels --shape short --json now.json         one shape, kept for later
  hope bench kernels --shape short --compare now.json      how much faster than then
  hope bench kernels --shape short --plot kernels.png      sweeps and a roofline
  hope bench kernels --static v6e                          on a machine without a TPU
"""


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
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes positionals in one stretch; key=value after an option is left over.
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    strangers = [word for word in rest if word not in overrides]
    if strangers or (rest and arguments.command != "train"):
        raise UserError(_stranger((strangers or rest)[0], arguments.command))
    if overrides:
        arguments.overrides += overrides
    return arguments


def _stranger(word: str, command: str) -> str:
    flags = {
        "train": ["--run", "--resume", "--auto-resume", "--overwrite", "--versus"],
        "eval": ["--data"],
        "generate": ["--prompt", "--max-bytes", "--temperature", "--top-k", "--seed"],
        "bench": [
            *("--list", "--op", "--shape", "--impl", "--mode", "--block-t"),
            *("--repeats", "--json", "--compare", "--plot", "--static"),
        ],
    }[command]
    near = difflib.get_close_matches(word.partition("=")[0], flags, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown argument {word!r}; {hint}see hope {command} --help"


def _complain(error: object, status: int) -> int:
    print(f"hope: {error}", file=sys.stderr)
    return status


def _train(arguments: argparse.Namespace, argv: list[str]) -> int:
    base = preset(arguments.preset)

    from hope_jax.training.command import run_training
    from hope_jax.training.interrupt import Stop
    from hope_jax.training.overrides import apply_overrides

    again = command(*(word for word in argv if word not in ("--resume", "--auto-resume", "--overwrite")), "--resume")
    stop = run_training(
        apply_overrides(base, arguments.overrides),
        arguments.run or Path("runs") / arguments.preset,
        resume=None if arguments.auto_resume else arguments.resume,
        overwrite=arguments.overwrite,
        versus=arguments.versus,
        again=again,
    )
    return {Stop.NO: 0, Stop.INTERRUPTED: EXIT_INTERRUPTED, Stop.PREEMPTED: EXIT_PREEMPTED}[stop]


def _eval(arguments: argparse.Namespace, argv: list[str]) -> int:
    del argv
    from hope_jax.training.evaluate import eval_file

    print(eval_file(arguments.run, arguments.data))
    return 0


def _generate(arguments: argparse.Namespace, argv: list[str]) -> int:
    del argv
    from hope_jax.training.generate import generate_text

    pieces = generate_text(
        arguments.run,
        arguments.prompt,
        max_bytes=arguments.max_bytes,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


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
