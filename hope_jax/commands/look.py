"""Looking at runs and at what they read: `hope watch`, `hope plot` and `hope data inspect`."""

import argparse
from pathlib import Path

from hope_jax.commands import Commands

_DATA_EXAMPLES = """a SOURCE is a file, a folder or a pattern (.jsonl .parquet .arrow .txt), or hub:NAME[@CONFIG];
several with weights are SOURCE:WEIGHT,SOURCE:WEIGHT. Read once, it lies in $HOPE_JAX_CACHE (default ~/.cache/hope_jax).

examples:
  hope data inspect tiny
  hope data inspect 'web/*.parquet:0.7,books.jsonl:0.3' documents=reset seq_len=1024
  hope data inspect notes.jsonl text_column=body tokenizer=tokenizer.json
"""


def add(commands: Commands) -> None:
    """Adds the commands."""
    watch = commands.add_parser("watch", help="live view of a running or finished run", allow_abbrev=False)
    watch.add_argument("run", type=Path, metavar="RUN", help="run directory, for example runs/tiny")
    watch.add_argument("--once", action="store_true", help="print it once, as it is now")
    watch.set_defaults(function=_watch)

    plot = commands.add_parser("plot", help="losses of runs in one picture", allow_abbrev=False)
    plot.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    plot.add_argument("--out", type=Path, default=Path("runs.png"), metavar="FILE", help="default: runs.png")
    plot.add_argument("--x", choices=["steps", "tokens", "time"], default="steps", help="over what (default: steps)")
    plot.add_argument("--levels", action="store_true", help="gradients of the CMS levels in the place of losses")
    plot.set_defaults(function=_plot)

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


def _watch(arguments: argparse.Namespace, argv: list[str]) -> int:
    del argv
    from hope_jax.training.watch import watch

    watch(arguments.run, once=arguments.once)
    return 0


def _plot(arguments: argparse.Namespace, argv: list[str]) -> int:
    del argv
    from hope_jax.training.plots import plot_runs

    print(plot_runs(arguments.runs, arguments.out, arguments.x, levels=arguments.levels))
    return 0


def _data(arguments: argparse.Namespace, argv: list[str]) -> int:
    del argv
    from rich.console import Console

    from hope_jax.training.inspection import inspect

    inspect(arguments.source, arguments.overrides, Console(highlight=False, soft_wrap=True, emoji=False))
    return 0
