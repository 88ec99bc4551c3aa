"""The command line: `hope train`, `hope watch`, `hope plot`, `hope eval`, `hope generate`, `hope shard-report`, ...

Only the parsing lives here; each command imports what it needs when it runs, so that help and mistakes answer
at once.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hope_jax.training.errors import RunFailed, UserError
from hope_jax.training.invocation import command
from hope_jax.training.presets import PRESETS, describe_presets, preset

if TYPE_CHECKING:
    from hope_jax.training.config import TrainConfig

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
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

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
    train.add_argument("--profile", metavar="FIRST:LAST", help="write an xprof trace of these steps to RUN/profile")
    train.set_defaults(function=_train)
    _add_watch(commands)

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
    _add_data(commands)
    _add_bench(commands)
    _add_compiled(commands)
    return parser


def _add_compiled(commands: "argparse._SubParsersAction[_Parser]") -> None:
    """The two commands that compile a training step without running it."""
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


def _add_watch(commands: "argparse._SubParsersAction[_Parser]") -> None:
    watch = commands.add_parser("watch", help="live view of a running or finished run", allow_abbrev=False)
    watch.add_argument("run", type=Path, metavar="RUN", help="run directory, for example runs/tiny")
    watch.add_argument("--once", action="store_true", help="print it once, as it is now")
    watch.set_defaults(function=_watch)

    plot = commands.add_parser("plot", help="losses of runs in one picture", allow_abbrev=False)
    plot.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    plot.add_argument("--out", type=Path, default=Path("runs.png"), metavar="FILE", help="default: runs.png")
    plot.add_argument("--x", choices=["steps", "tokens", "time"], default="steps", help="over what (default: steps)")
    plot.set_defaults(function=_plot)


def _add_data(commands: "argparse._SubParsersAction[_Parser]") -> None:
    data = commands.add_parser(
        "data",
        help="look at what a run reads: hope data inspect FILE",
        description="Tokens, documents, packing and three samples of what a run reads.",
        epilog=_DATA_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    data.add_argument("what", choices=["inspect"], help="what to do")
    data.add_argument("source", metavar="PRESET|SOURCE", help="a preset, or what data= takes")
    data.add_argument("overrides", nargs="*", metavar="key=value", help="for example documents=reset seq_len=1024")
    data.set_defaults(function=_data)


_DATA_EXAMPLES = """a SOURCE is a file, a folder or a pattern (.jsonl .parquet .arrow .txt), or hub:NAME[@CONFIG];
several with weights are SOURCE:WEIGHT,SOURCE:WEIGHT. Read once, it lies in $HOPE_JAX_CACHE (default ~/.cache/hope_jax).

examples:
  hope data inspect tiny
  hope data inspect 'web/*.parquet:0.7,books.jsonl:0.3' documents=reset seq_len=1024
  hope data inspect notes.jsonl text_column=body tokenizer=tokenizer.json
"""
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
    if strangers or (rest and not hasattr(arguments, "overrides")):
        raise UserError(_stranger((strangers or rest)[0], arguments.command))
    if overrides:
        arguments.overrides += overrides
    return arguments


def _stranger(word: str, command: str) -> str:
    flags = {
        "train": ["--run", "--resume", "--auto-resume", "--overwrite", "--versus", "--profile"],
        "watch": ["--once"],
        "plot": ["--out", "--x"],
        "eval": ["--data"],
        "data": ["--help"],
        "generate": ["--prompt", "--max-bytes", "--temperature", "--top-k", "--seed"],
        "shard-report": ["--mesh", "--json"],
        "aot": ["--topology", "--slices", "--mesh", "--json"],
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


def _on_mesh(arguments: argparse.Namespace) -> "TrainConfig":
    """The config of a preset with its overrides and `--mesh`."""
    base = preset(arguments.preset)

    from hope_jax.training.overrides import apply_overrides

    axes = [f"mesh.{part}" for part in arguments.mesh.split(",") if part]
    return apply_overrides(base, [*arguments.overrides, *axes])


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


def _without_profile(words: Iterable[str]) -> list[str]:
    """A continuation takes other steps than those that were traced."""
    kept, skip = [], False
    for word in words:
        if not skip and word.partition("=")[0] != "--profile":
            kept.append(word)
        skip = word == "--profile"
    return kept


def _watch(arguments: argparse.Namespace, argv: list[str]) -> int:
    del argv
    from hope_jax.training.watch import watch

    watch(arguments.run, once=arguments.once)
    return 0


def _plot(arguments: argparse.Namespace, argv: list[str]) -> int:
    del argv
    from hope_jax.training.plots import plot_runs

    print(plot_runs(arguments.runs, arguments.out, arguments.x))
    return 0


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


def _data(arguments: argparse.Namespace, argv: list[str]) -> int:
    del argv
    from rich.console import Console

    from hope_jax.training.inspection import inspect

    inspect(arguments.source, arguments.overrides, Console(highlight=False, soft_wrap=True, emoji=False))
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
