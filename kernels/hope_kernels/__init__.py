"""Kernels for nested learning, on jax alone; one folder per operation, the same file names in each."""

from hope_kernels.delta_rule import Config, DeltaRuleOutput, delta_rule, delta_rule_sharded, delta_rule_step
from hope_kernels.dispatch import explain
from hope_kernels.dplr_delta_rule import DPLRDeltaRuleOutput, dplr_delta_rule, dplr_delta_rule_step
from hope_kernels.mlp_memory import MLPMemoryOutput, mlp_memory

__all__ = [
    "Config",
    "DPLRDeltaRuleOutput",
    "DeltaRuleOutput",
    "MLPMemoryOutput",
    "delta_rule",
    "delta_rule_sharded",
    "delta_rule_step",
    "dplr_delta_rule",
    "dplr_delta_rule_step",
    "explain",
    "mlp_memory",
]
