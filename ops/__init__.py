"""Operators: functions on tensors, each with a reference loop, a fast torch form and Triton kernels."""

from zoo.ops.causal_conv1d import causal_conv1d
from zoo.ops.delta_rule import delta_rule

__all__ = ["causal_conv1d", "delta_rule"]
