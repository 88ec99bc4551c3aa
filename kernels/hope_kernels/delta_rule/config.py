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
    segments: int | None = None  # of the sequence, computed side by side (segments.py); not for `reference`
    axis: str | None = None  # what `delta_rule_sharded` sets inside its `shard_map` (check_vma=False): the axis of time
    interpret: Any = None  # True, or the backend's InterpretParams: simulate a TPU or GPU kernel on a CPU

    def __post_init__(self):
        for name in ("block_t", "heads", "group", "segments"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")


def default_block_t(tokens: int) -> int:
    """Tokens per tile of the XLA form for a call of `tokens` tokens: one tile up to 64, then equal tiles."""
    tiles = -(-tokens // LARGEST)
    if tiles <= 1:
        return max(tokens, 1)
    return -(-tokens // (tiles * MULTIPLE)) * MULTIPLE


@dataclass(frozen=True)
class TPUSizes:
    """A `Config` for the TPU kernels with every size chosen."""

    block_t: int
    heads: int
    group: int  # forwards
    gradient_group: int  # backwards


# By the compiler's schedule for K = V = 128 in bfloat16 (README of pallas_tpu); the chip's name as jax gives it.
TPU_SIZES = {
    "TPU v5 lite": TPUSizes(block_t=128, heads=16, group=8, gradient_group=4),
    "TPU v5": TPUSizes(block_t=128, heads=16, group=8, gradient_group=4),
    "TPU v6 lite": TPUSizes(block_t=128, heads=16, group=16, gradient_group=8),
    "TPU7x": TPUSizes(block_t=128, heads=16, group=16, gradient_group=8),
}


def tpu_sizes(chip: str, tokens: int, config: Config) -> TPUSizes:
    """The sizes of `config`, those that it leaves open from the table; a short call gets a short tile."""
    table = TPU_SIZES.get(chip, TPU_SIZES["TPU v6 lite"])
    short = 64 if tokens <= 64 else table.block_t
    group, gradient_group = config.group or table.group, config.group or table.gradient_group
    return TPUSizes(config.block_t or short, config.heads or table.heads, group, gradient_group)
