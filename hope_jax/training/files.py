"""Writing a file so that a reader, or a process that dies, finds the old content or the new, never a part."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of text."""
    write_bytes(path, text.encode(), path.with_name(f"{path.name}.{os.getpid()}.tmp"))


def write_bytes(path: Path, content: bytes, temporary: Path) -> None:
    """Replaces the content of a file in one step.

    Args:
      path: the file; it may exist.
      content: all of its new content.
      temporary: a name beside it, for this process alone.
    Raises:
      OSError: the directory cannot be written or is full; the old content is still there.
    """
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
