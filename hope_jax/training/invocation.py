"""How the command was started, so that the commands it prints can be typed."""

import shlex
import shutil
import sys
from pathlib import Path


def command(*words: str) -> str:
    """A command line that runs `hope` with some words, the way this process was started.

    >>> command("train", "tiny").endswith(" train tiny")
    True
    """
    return shlex.join([*_program(), *words])


def _program() -> list[str]:
    script = Path(sys.argv[0])
    if script.name == "__main__.py" and script.parent.name == "hope_jax":
        return [sys.orig_argv[0] or sys.executable, "-m", "hope_jax"]
    if script.name != "hope" or shutil.which("hope") == sys.argv[0]:
        return ["hope"]  # called from Python, or found on the PATH
    return [sys.argv[0]]
