"""Using a trained run: `hope eval` and `hope generate`."""

import argparse
from pathlib import Path

from hope_jax.commands import Commands


def add(commands: Commands) -> None:
    """Adds the commands."""
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
    generate.add_argument("--session", type=Path, metavar="FILE", help="answer from what hope learn or hope chat saved")
    generate.set_defaults(function=_generate)


def _eval(arguments: argparse.Namespace, argv: list[str]) -> int:
    del argv
    from hope_jax.training.evaluate import eval_file

    print(eval_file(arguments.run, arguments.data))
    return 0


def _generate(arguments: argparse.Namespace, argv: list[str]) -> int:
    del argv
    from hope_jax.training.generate import check_sampling, generate_text

    sampling = {"temperature": arguments.temperature, "top_k": arguments.top_k, "seed": arguments.seed}
    if arguments.session is None:
        pieces = generate_text(arguments.run, arguments.prompt, max_bytes=arguments.max_bytes, **sampling)
    else:
        from hope_jax.online.learn import answer_from
        from hope_jax.training.cache import keep_compiled

        keep_compiled()
        check_sampling(arguments.max_bytes, **sampling)
        pieces = answer_from(
            arguments.run, arguments.session, arguments.prompt, max_tokens=arguments.max_bytes, **sampling
        )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
