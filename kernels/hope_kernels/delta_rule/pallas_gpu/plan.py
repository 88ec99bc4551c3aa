"""What a call looks like to the kernels: everything that is known before the arrays are."""

from typing import Any, NamedTuple


class Plan(NamedTuple):
    """Static facts of a call."""

    heads: int
    before: bool  # reads see the state before the token's own write
    erase: bool
    decay: bool
    reset: bool
    parts: int  # bfloat16 numbers per entry of the inverse and of what it is multiplied with
    square_parts: int  # and of the [C, C] matrices of the gradients
    columns: int  # of V that one block of the scans works on, 64 per warpgroup
    interpret: Any

    @property
    def scaled(self) -> bool:
        """Whether anything fades: a forgotten document is a decay to nothing."""
        return self.decay or self.reset
