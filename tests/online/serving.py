"""A service on a real port, for the tests that need one."""

import contextlib
import socket
import threading

import uvicorn

from hope_jax.online.serve import HTTP

TOKEN = "a secret"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}


@contextlib.contextmanager
def running(app):
    """A real server on a free port; its address."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        server = uvicorn.Server(uvicorn.Config(app, http=HTTP, log_level="warning", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
