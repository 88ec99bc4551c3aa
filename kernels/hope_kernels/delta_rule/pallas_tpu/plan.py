"""What a call looks like to the kernels: its sizes, which terms are there, and how it is cut into grid cells."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from hope_kernels.delta_rule.config import TPUSizes

LANES = 128


@dataclass(frozen=True)
class Plan:
    """Everything static about a call.

    A grid cell walks over the tiles of `rows` batch entries and `cell_heads` of their heads. Each pair of a batch
    entry and a head is a stream with a state of its own; `group` streams are computed together, so
    that the units of the core have independent work while one stream waits for a product.
    """

    batch: int
    tokens: int  # a multiple of tile
    key_heads: int
    heads: int
    key_width: int
    value_width: int
    sizes: TPUSizes  # what the chip's table and the caller ask for
    rows: int  # batch entries per cell
    cell_heads: int  # value heads per cell
    group: int  # streams computed together, forwards
    gradient_group: int  # and backwards
    read: str | None  # "before", "after"; None: nothing is read
    erase: bool
    decay: bool
    resets: bool
    inverse_passes: int  # bfloat16 passes per product, see products.py
    passes: int  # of every other product of the forward pass, and of those with the state
    gradient_passes: int  # of the products inside a tile in the backward pass
    interpret: Any

    @property
    def tile(self) -> int:
        """Tokens per tile."""
        return self.sizes.block_t

    @property
    def tiles(self) -> int:
        return self.tokens // self.tile

    @property
    def cell_key_heads(self) -> int:
        """Key heads per cell; one key head may also serve several cells."""
        return max(self.cell_heads * self.key_heads // self.heads, 1)

    @property
    def cells(self) -> int:
        """Cells side by side along the heads."""
        return self.heads // self.cell_heads

    @property
    def streams(self) -> int:
        """Streams per cell."""
        return self.rows * self.cell_heads

    @property
    def inverse_dtype(self) -> Any:
        """In which the triangular inverses are kept: bfloat16 where they are used as that."""
        return jnp.bfloat16 if self.inverse_passes == 1 else jnp.float32

    def groups(self, size: int) -> list[list["Stream"]]:
        """The streams of a cell, `size` of them computed together in a list of their own."""
        streams = [self._stream(row, head) for row in range(self.rows) for head in range(self.cell_heads)]
        return [streams[i : i + size] for i in range(0, len(streams), size)]

    def _stream(self, row: int, head: int) -> "Stream":
        return Stream(row * self.cell_heads + head, row, head, head * self.cell_key_heads // self.cell_heads)


@dataclass(frozen=True)
class Stream:
    """One head of one batch entry within its cell."""

    number: int  # where its state lies
    row: int  # batch entry
    head: int  # value head
    key_head: int
