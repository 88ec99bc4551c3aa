"""Kernels for nested learning, on jax alone; one folder per operation, the same file names in each."""

from hope_kernels.delta_rule import DeltaRuleOutput, delta_rule

__all__ = ["DeltaRuleOutput", "delta_rule"]
