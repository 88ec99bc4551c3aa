"""How the work is cut. It sets the speed and must not change the numbers."""

from dataclasses import dataclass
from typing import Any

LARGEST = 64
MULTIPLE = 16


@dataclass(frozen=True)
class Config:
    """Sizes that an implementation may be told; None leaves the choice to the tables of this file.

    Raises:
        ValueError: a size below one.
    """

    block_t: int | None = None  # tokens per tile
    heads: int | None = None  # TPU: value heads per grid cell
    group: int | None = None  # TPU: heads computed together inside a cell
    parts: int | None = None  # GPU: parts of one long sequence that run side by side
    interpret: Any = None  # True, or the backend's InterpretParams: simulate a TPU or GPU kernel on a CPU

    def __post_init__(self):
        for name in ("block_t", "heads", "group", "parts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")


def default_block_t(tokens: int) -> int:
    """Tokens per tile of the XLA form for a call of `tokens` tokens: one tile up to 64, then equal tiles."""
    tiles = -(-tokens // LARGEST)
    if tiles <= 1:
        return max(tokens, 1)
    return -(-tokens // (tiles * MULTIPLE)) * MULTIPLE
