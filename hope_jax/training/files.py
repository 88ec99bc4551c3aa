"""Writing a file so that a reader, or a process that dies, finds the old content or the new, never a part."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of text."""
    write_bytes(path, text.encode(), path.with_name(f"{path.name}.{os.getpid()}.tmp"))


def write_bytes(path: Path, content: bytes, temporary: Path, mode: int = 0o666) -> None:
    """Replaces the content of a file in one step.

    Args:
      path: the file; it may exist.
      content: all of its new content.
      temporary: a name beside it, for this process alone; whatever has it is removed.
      mode: of the file, less the process's umask.
    Raises:
      OSError: the directory cannot be written or is full; the old content is still there.
    """
    try:
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
