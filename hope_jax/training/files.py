"""Writing a small file so that a reader, or a process that dies, finds the old text or the new, never a part."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replaces the content of a file in one step.

    Args:
      path: the file; it may exist.
      text: all of its new content.
    Raises:
      OSError: the directory cannot be written or is full; the old content is still there.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
