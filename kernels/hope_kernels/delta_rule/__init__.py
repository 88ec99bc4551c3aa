"""The recurrence behind every matrix-shaped memory; the derivation is in this folder's README.md."""

from hope_kernels.delta_rule.api import IMPLEMENTATIONS, delta_rule
from hope_kernels.delta_rule.types import DeltaRuleOutput

__all__ = ["IMPLEMENTATIONS", "DeltaRuleOutput", "delta_rule"]
