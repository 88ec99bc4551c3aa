"""`hope serve`: the service on an address, from the start until it has saved all sessions."""

import contextlib
import fcntl
import secrets
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import uvicorn
from rich.console import Console

from hope_jax.online.keeping import from_run
from hope_jax.online.learn import learning_options
from hope_jax.online.service import build_app
from hope_jax.online.session import Session
from hope_jax.training.errors import UserError

# It refuses a long header or address; httptools, which uvicorn prefers where it is installed, keeps any in memory.
HTTP: Literal["h11"] = "h11"


def serve(
    run_dir: Path,
    overrides: list[str],
    *,
    host: str,
    port: int,
    token: str | None,
    directory: Path | None,
    max_sessions: int,
    max_bytes: int,
    gate: str | None = None,
    max_moved: float | None = None,
) -> None:
    """Serves a trained run until Ctrl-C or SIGTERM, and saves all sessions then.

    Args:
      run_dir: of the run.
      overrides: fields of the model config, as "cms_eta=0.5".
      host: address to listen on.
      port: 0 takes a free one.
      token: that every request must bring, which is not printed; None: a new one, which is.
      directory: of the sessions' files; None: sessions/ in the run's directory.
      max_sessions: in memory.
      max_bytes: of a request's text.
      gate: of the sessions, as of `parse_gate`; None: every chunk is written.
      max_moved: how far a level may go, as of `Session`.

    Raises:
      UserError: no such run, a value out of range, an address or directory that is taken.
    """
    for name, value, least in (("port", port, 0), ("max-sessions", max_sessions, 1), ("max-bytes", max_bytes, 1)):
        if value < least:
            raise UserError(f"--{name} {value} must be at least {least}")
    if port > 65535:
        raise UserError(f"--port {port} must be at most 65535; 0 takes a free one")
    if token is not None and not (token and token.isascii() and token.isprintable()):
        raise UserError("the token must be one or more printable ASCII characters; give another with --token")
    directory = directory or run_dir / "sessions"
    console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)
    base = from_run(run_dir, tuple(overrides), **learning_options(gate, max_moved))
    base.run = ""  # files that users take home name no folder of the server
    with _listen(host, port) as listener, _alone(directory):
        with console.status("compiling ..."):
            _compile(base)
        known, token = token is not None, token or secrets.token_urlsafe(24)
        app = build_app(
            base, directory, token=token, max_sessions=max_sessions, max_bytes=max_bytes, said=console.print
        )
        name = f"[{host}]" if ":" in host else host
        console.print(f"serving {run_dir}, sessions in {directory}; Ctrl-C saves them and stops")
        console.print(f"http://{name}:{listener.getsockname()[1]}/" + ("" if known else f"#token={token}"))
        with _signals_are_for_uvicorn():
            config = uvicorn.Config(app, http=HTTP, log_level="warning", access_log=False, timeout_graceful_shutdown=30)
            _Server(config).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Ends answers that are being streamed when it is told to stop."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        app: Any = self.config.app
        app.state.users.closing = True
        super().handle_exit(sig, frame)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} ({error}); choose another --port or --host") from error


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One service at a time has a directory of sessions."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (directory / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror}; give another with --sessions") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another service keeps its sessions in {directory}; give another --sessions") from error
        for path in directory.glob(f".{'[0-9a-f]' * 32}"):
            path.unlink(missing_ok=True)  # uploads that a service which was killed had begun
        yield


@contextlib.contextmanager
def _signals_are_for_uvicorn() -> Iterator[None]:
    """After it has stopped it raises them again, which would be a second, sudden end."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _compile(base: Session) -> None:
    """So that the first request does not wait for it."""
    session = base.fork()
    session.observe(np.zeros(session.chunk_size + 1, np.int32))
    session.generate(max_tokens=1)
