"""Operators: functions on tensors, each with a reference loop, a fast torch form and Triton kernels."""

from zoo.ops.attention import attention
from zoo.ops.causal_conv1d import causal_conv1d

__all__ = ["attention", "causal_conv1d"]
