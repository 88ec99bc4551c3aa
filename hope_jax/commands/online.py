"""Learning after deployment: `hope learn`, `hope chat` and `hope serve`."""

import argparse
import os
from pathlib import Path
from typing import Any

from hope_jax.commands import Commands
from hope_jax.training.errors import UserError

_FLOW = """a session is a file: what was read and learned since it began; the run is never changed.

examples:
  hope learn runs/tiny --session alice.hope --data facts.txt
  hope generate runs/tiny --session alice.hope --prompt "The password of the archive is"
  hope chat runs/tiny --session alice.hope
"""
_SERVE = """examples:
  hope serve runs/tiny
  HOPE_TOKEN=secret hope serve runs/tiny --port 9000 --sessions /srv/sessions
  curl -H "Authorization: Bearer secret" --data-binary @facts.txt localhost:9000/v1/sessions/alice/observe

it speaks HTTP: beyond this machine put a server with TLS before it.
"""


def add(commands: Commands) -> None:
    """Adds the commands."""
    learn = _command(commands, "learn", "read a text into a session: hope learn RUN --session FILE --data FILE", _FLOW)
    learn.add_argument("--session", type=Path, required=True, metavar="FILE", help="it is continued if it exists")
    learn.add_argument("--data", type=Path, required=True, metavar="FILE", help="a UTF-8 text file, or a pipe")
    learn.set_defaults(function=_learn)

    chat = _command(commands, "chat", "talk with a run that learns from it, and see it learn", _FLOW)
    chat.add_argument("--session", type=Path, metavar="FILE", help="continued if it exists, saved at the end")
    chat.add_argument("--max-tokens", type=int, default=200, metavar="N", help="of an answer (default 200)")
    chat.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 takes the likeliest (default 0.8)")
    chat.set_defaults(function=_chat)

    serve = _command(commands, "serve", "sessions over HTTP, one per user, with a page to watch them learn", _SERVE)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (default 8000)")
    serve.add_argument("--token", help="that requests must bring (default: $HOPE_TOKEN, else a new one, printed)")
    serve.add_argument("--sessions", type=Path, metavar="DIR", help="their files (default: RUN/sessions)")
    serve.add_argument("--max-sessions", type=int, default=64, metavar="N", help="in memory (default 64)")
    serve.add_argument("--max-bytes", type=int, default=1_000_000, metavar="N", help="of a text (default 1000000)")
    serve.set_defaults(function=_serve)


def _command(commands: Commands, name: str, what: str, epilog: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=what, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, for example runs/tiny")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the model: cms_eta=0.5 cms_chunks=16,64")
    parser.add_argument("--gate", metavar="NAME[:NUMBERS]", help="which chunks a new session learns: budget:0.25")
    parser.add_argument("--max-moved", type=float, metavar="X", help="how far a level may go, in norms of its start")
    return parser


def _learning(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"gate": arguments.gate, "max_moved": arguments.max_moved}


def _learn(arguments: argparse.Namespace, argv: list[str]) -> int:
    del argv
    from hope_jax.online.learn import learn_file
    from hope_jax.training.cache import keep_compiled

    keep_compiled()
    learn_file(arguments.run, arguments.session, arguments.data, arguments.overrides, **_learning(arguments))
    return 0


def _chat(arguments: argparse.Namespace, argv: list[str]) -> int:
    del argv
    from hope_jax.online.chat import chat
    from hope_jax.training.cache import keep_compiled

    keep_compiled()
    options = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature}
    chat(arguments.run, arguments.session, arguments.overrides, **_learning(arguments), **options)
    return 0


def _serve(arguments: argparse.Namespace, argv: list[str]) -> int:
    del argv
    try:
        from hope_jax.online.serve import serve
    except ModuleNotFoundError as error:
        raise UserError(f"hope serve needs {error.name}; install it with: pip install 'hope-jax[serve]'") from error
    from hope_jax.training.cache import keep_compiled

    keep_compiled()
    serve(
        arguments.run,
        arguments.overrides,
        host=arguments.host,
        port=arguments.port,
        token=arguments.token if arguments.token is not None else os.environ.get("HOPE_TOKEN"),
        directory=arguments.sessions,
        max_sessions=arguments.max_sessions,
        max_bytes=arguments.max_bytes,
        **_learning(arguments),
    )
    return 0
