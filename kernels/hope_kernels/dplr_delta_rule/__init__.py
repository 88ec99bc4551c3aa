"""The delta rule with a diagonal plus low-rank transition; the derivation is in this folder's README.md."""

from hope_kernels.dplr_delta_rule.api import IMPLEMENTATIONS, dplr_delta_rule
from hope_kernels.dplr_delta_rule.step import dplr_delta_rule_step
from hope_kernels.dplr_delta_rule.types import DPLRDeltaRuleOutput

__all__ = ["IMPLEMENTATIONS", "DPLRDeltaRuleOutput", "dplr_delta_rule", "dplr_delta_rule_step"]
