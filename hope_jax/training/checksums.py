"""Checksums of a checkpoint: written before it becomes visible under its name, compared before it is used."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hope_jax.training.files import write_text

CHECKSUMS = "checksums.json"
# Orbax writes the time of the commit into these two after everything else; nothing is read from them.
UNCHECKED = frozenset({CHECKSUMS, "_CHECKPOINT_METADATA", "commit_success.txt"})


def write_checksums(directory: Path) -> None:
    """Writes checksums.json: sha256 and size of every file below a directory.

    Args:
      directory: a checkpoint that is complete but for its name.
    """
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    names = [name for path in paths if (name := path.relative_to(directory).as_posix()) not in UNCHECKED]
    with ThreadPoolExecutor(8) as pool:  # hashing and reading release the interpreter lock
        digests = list(pool.map(lambda name: _digest(directory / name), names))
    sums = {
        name: {"sha256": digest, "bytes": (directory / name).stat().st_size}
        for name, digest in zip(names, digests, strict=True)
    }
    write_text(directory / CHECKSUMS, json.dumps(sums, indent=0) + "\n")


def read_checksums(directory: Path) -> Mapping[str, Mapping[str, str | int]] | None:
    """What checksums.json says, None without one.

    Raises:
      ValueError: it is damaged; the message says so in one line.
    """
    path = directory / CHECKSUMS
    if not path.exists():
        return None
    try:
        sums = json.loads(path.read_text())
        whole = bool(sums) and all({"sha256", "bytes"} <= set(entry) for entry in sums.values())
    except (ValueError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{CHECKSUMS} is damaged")
    return sums


def find_damage(directory: Path, share: int = 0, shares: int = 1) -> str | None:
    """The first file that is not as it was written, as "name: what is wrong"; None if there is none.

    Args:
      directory: a checkpoint.
      share, shares: look at every `shares`-th file only, so that several processes divide the reading.
    Returns:
      None too without a checksums.json: there is nothing to compare with.
    """
    try:
        sums = read_checksums(directory)
    except ValueError as error:
        return str(error)
    mine = list((sums or {}).items())[share::shares]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda item: _compare(directory / item[0], item[0], item[1]), mine)
        return next((problem for problem in found if problem), None)


def _compare(path: Path, name: str, entry: Mapping[str, str | int]) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{name}: {size} bytes, {entry['bytes']} were written"
        return None if _digest(path) == entry["sha256"] else f"{name}: other bytes than were written"
    except OSError as error:
        return f"{name}: {error.strerror}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
