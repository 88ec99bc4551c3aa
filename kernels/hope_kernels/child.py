"""Running a piece of work in a Python process of its own, without handing it objects: only names and JSON.

Compilers read their environment once, when they are loaded, and may end the process they are in. Such work is described
by a function of a module and JSON arguments for it; the child imports the function and calls it again. It ends when its
parent does, however that came about: its standard input is a pipe that only the parent could write to.
"""

import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any


def run(module: str, folder: str, build: Callable[..., Any], arguments: Any, environment: Mapping[str, str]) -> Any:
    """`python -m MODULE FOLDER BUILD ARGUMENTS` with this process's import path; returns the CompletedProcess.

    Raises:
        ValueError: `build` is not a function that a module has under its own name.
        TypeError: `arguments` are not JSON.
    """
    where = f"{build.__module__}:{build.__qualname__}"
    if build.__module__ == "__main__" or "<" in where:
        raise ValueError(f"another process cannot import {where}; pass a function of a module")
    paths = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", module, folder, where, json.dumps(arguments)]
    lifeline, held = os.pipe()
    try:
        return subprocess.run(
            command,
            env={**os.environ, **environment, "PYTHONPATH": paths},
            stdin=lifeline,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        os.close(lifeline)
        os.close(held)


def described(argv: list[str]) -> tuple[str, Callable[..., Any], Any]:
    """What the child reads from its command line: folder, function, arguments; from here on it ends with its parent."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    folder, where, arguments = argv[1:]
    module, _, name = where.partition(":")
    return folder, getattr(importlib.import_module(module), name), json.loads(arguments)


def _end_with_the_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written: this returns when the other end is gone
    os._exit(1)
