"""Which code wrote a checkpoint: the versions of the libraries, and a fingerprint of this package's own source."""

import functools
import hashlib
from importlib.metadata import version
from pathlib import Path

import hope_jax

LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Version of each library, and of the code.

    >>> sorted(versions())[:3]
    ['flax', 'hope_jax', 'jax']
    """
    return {"hope_jax": code_version(), **{name: version(name) for name in LIBRARIES}}


@functools.cache
def code_version() -> str:
    """Twelve hexadecimal digits that differ when any source file of the package does; needs no git."""
    root = Path(hope_jax.__file__).parent
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]
