"""Operators: functions on tensors, each with a reference loop, a fast torch form and Triton kernels."""

from zoo.ops.attention import attention
from zoo.ops.causal_conv1d import causal_conv1d
from zoo.ops.delta_rule import delta_rule
from zoo.ops.gated_linear_attention import gated_linear_attention

__all__ = ["attention", "causal_conv1d", "delta_rule", "gated_linear_attention"]
