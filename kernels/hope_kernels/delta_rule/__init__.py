"""The recurrence behind every matrix-shaped memory; the derivation is in this folder's README.md."""

from hope_kernels.delta_rule.api import IMPLEMENTATIONS, delta_rule
from hope_kernels.delta_rule.config import Config
from hope_kernels.delta_rule.sharded import delta_rule_sharded
from hope_kernels.delta_rule.step import delta_rule_step
from hope_kernels.delta_rule.types import DeltaRuleOutput

__all__ = ["IMPLEMENTATIONS", "Config", "DeltaRuleOutput", "delta_rule", "delta_rule_sharded", "delta_rule_step"]
