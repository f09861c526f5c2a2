"""Operators: functions on tensors, each with a reference loop, a fast torch form and Triton kernels."""

from zoo.ops.attention import attention
from zoo.ops.causal_conv1d import causal_conv1d, causal_conv1d_summary
from zoo.ops.delta_rule import delta_rule, delta_rule_summary
from zoo.ops.gated_linear_attention import gated_linear_attention, gated_linear_attention_summary
from zoo.ops.ssd import ssd, ssd_summary

__all__ = [
    "attention",
    "causal_conv1d",
    "causal_conv1d_summary",
    "delta_rule",
    "delta_rule_summary",
    "gated_linear_attention",
    "gated_linear_attention_summary",
    "ssd",
    "ssd_summary",
]
