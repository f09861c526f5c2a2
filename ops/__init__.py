"""Operators: functions on tensors, each with a reference loop, a fast torch form and Triton kernels."""

from zoo.ops.causal_conv1d import causal_conv1d

__all__ = ["causal_conv1d"]
