"""Operators: functions on tensors, each with a reference loop, a fast torch form and Triton kernels."""

from zoo.ops.affine_scan import affine_scan, affine_scan_summary
from zoo.ops.attention import attention
from zoo.ops.block_affine_scan import block_affine_scan, block_affine_scan_summary
from zoo.ops.causal_conv1d import causal_conv1d, causal_conv1d_summary
from zoo.ops.delta_rule import delta_rule, delta_rule_summary
from zoo.ops.gated_linear_attention import gated_linear_attention, gated_linear_attention_summary
from zoo.ops.selective_scan import selective_scan, selective_scan_summary

__all__ = [
    "affine_scan",
    "affine_scan_summary",
    "attention",
    "block_affine_scan",
    "block_affine_scan_summary",
    "causal_conv1d",
    "causal_conv1d_summary",
    "delta_rule",
    "delta_rule_summary",
    "gated_linear_attention",
    "gated_linear_attention_summary",
    "selective_scan",
    "selective_scan_summary",
]
