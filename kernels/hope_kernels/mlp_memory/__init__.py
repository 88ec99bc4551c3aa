"""A two-layer memory written in chunks; the derivation is in this folder's README.md."""

from hope_kernels.mlp_memory.api import IMPLEMENTATIONS, mlp_memory
from hope_kernels.mlp_memory.types import MLPMemoryOutput

__all__ = ["IMPLEMENTATIONS", "MLPMemoryOutput", "mlp_memory"]
