"""The definitions of RMSNorm and its gated forms; statistics in float32 at least."""

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, gate_first: bool) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; silu(gate) multiplies x before or y after it."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    factor = None if gate is None else gate.to(y.dtype) * torch.sigmoid(gate.to(y.dtype))
    if factor is not None and gate_first:
        y = y * factor
    y = y / torch.sqrt(y.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if factor is not None and not gate_first:
        y = y * factor
    return y.to(x.dtype)
