"""Normalisations: RMSNorm, its gated form, and the L2 norm of keys and queries."""

import torch
from torch import Tensor, nn

from zoo.ops import gated_rms_norm, rms_norm
from zoo.ops.rms_norm import Order


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; statistics in float32."""

    def __init__(self, d_model: int, *, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class GatedRMSNorm(RMSNorm):
    """RMSNorm with a gate, by default RMSNorm(x) * silu(gate).

    Args:
        d_model: D.
        eps: added to the mean square.
        order: "norm_first", or "gate_first" for RMSNorm(x * silu(gate)).
    """

    def __init__(self, d_model: int, *, eps: float = 1e-6, order: Order = "norm_first"):
        super().__init__(d_model, eps=eps)
        self.order: Order = order

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return gated_rms_norm(x, gate.to(x.dtype), self.weight.to(x.dtype), self.eps, order=self.order)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, order={self.order}"


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dimension: a zero vector stays zero."""
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + eps).to(x.dtype)
