"""Kernels for nested learning, on jax alone; one folder per operation, the same file names in each."""

from hope_kernels.delta_rule import Config, DeltaRuleOutput, delta_rule, delta_rule_sharded, delta_rule_step
from hope_kernels.dispatch import explain

__all__ = ["Config", "DeltaRuleOutput", "delta_rule", "delta_rule_sharded", "delta_rule_step", "explain"]
