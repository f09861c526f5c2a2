"""Normalisations: RMSNorm, its gated form, the norm of each head, and the L2 norm of keys and queries."""

import torch
from torch import Tensor, nn

from zoo.ops import gated_rms_norm, rms_norm
from zoo.ops.core.call import Operators
from zoo.ops.token_wise.rms_norm import Order


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; statistics in float32."""

    operators: Operators = (rms_norm,)

    def __init__(self, d_model: int, *, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D), in the dtype of x."""
        return rms_norm(x, self.weight.to(x.dtype), self.eps)

    def extra_repr(self) -> str:
        """Width and eps, for print(model)."""
        return f"{self.weight.numel()}, eps={self.eps}"


class GatedRMSNorm(RMSNorm):
    """RMSNorm with a gate, by default RMSNorm(x) * silu(gate).

    Args:
        d_model: D.
        eps: added to the mean square.
        order: "norm_first", or "gate_first" for RMSNorm(x * silu(gate)).
        groups: every D / groups neighbouring channels have a mean square of their own.
    """

    operators: Operators = (gated_rms_norm,)

    def __init__(self, d_model: int, *, eps: float = 1e-6, order: Order = "norm_first", groups: int = 1):
        super().__init__(d_model, eps=eps)
        if d_model % groups:
            raise ValueError(f"GatedRMSNorm: groups must divide d_model = {d_model}; got {groups}")
        self.order: Order = order
        self.groups = groups

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """x and gate (..., D) -> (..., D), in the dtype of x."""
        gate, weight = gate.to(x.dtype), self.weight.to(x.dtype)
        if self.groups == 1:
            return gated_rms_norm(x, gate, weight, self.eps, order=self.order)
        x, gate = (z.unflatten(-1, (self.groups, -1)) for z in (x, gate))
        return gated_rms_norm(x, gate, None, self.eps, order=self.order).flatten(-2) * weight

    def extra_repr(self) -> str:
        """Width, eps, order and groups, for print(model)."""
        return f"{super().extra_repr()}, order={self.order}, groups={self.groups}"


class HeadNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight over each head of (B, T, H, D); statistics in float32."""

    def __init__(self, n_heads: int, head_dim: int, *, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., H, K) -> the same shape, every head by itself."""
        return nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight.to(x.dtype)

    def extra_repr(self) -> str:
        """Heads, their width and eps, for print(model)."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dimension: a zero vector stays zero."""
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + eps).to(x.dtype)
