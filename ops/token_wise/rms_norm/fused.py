"""Fast torch form: the closed gradient, in few passes over memory, with nothing saved but the inputs.

CPU, one thread, float32, forward and backward, time over that of F.rms_norm (times F.silu(gate)) at (8, 256, 128) and
(1, 2048, 1024), the best of 40 on a shared machine: plain 0.51, 0.35; heads of 64 0.79, 0.25; heads of 64 with a gate
after the norm 0.38, 0.77; with a gate before it 0.93, 0.78.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.core.autograd import apply
from zoo.ops.core.differentiation import first_order

WIDE = (torch.float32, torch.float64)


def rms_norm_fused(
    x: Tensor, weight: Tensor | None, eps: float, gate: Tensor | None = None, gate_first: bool = False
) -> Tensor:
    """x, gate (..., D), weight (D,) -> (..., D)."""
    if not torch.is_grad_enabled():  # without autograd's wrapper, half of the time of a decoded token's norm
        return _normed(x, gate, weight, eps, gate_first)[0]
    y: Tensor = apply(_RMSNorm, x, gate, weight, eps, gate_first)
    return y


def _normed(
    x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, gate_first: bool
) -> tuple[Tensor, Tensor]:
    """y, and 1 / the root mean square."""
    u, factor = _wide(x), None if gate is None else F.silu(_wide(gate))
    if factor is not None and gate_first:
        u = factor.mul_(u)
    scale = _scale(u, eps)
    y = u * scale
    if weight is not None:
        y.mul_(weight)
    if factor is not None and not gate_first:
        y.mul_(factor)
    return y if y.dtype == x.dtype else y.to(x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, gate_first: bool
    ) -> Tensor:
        y, scale = _normed(x, gate, weight, eps, gate_first)
        ctx.save_for_backward(x, gate, weight, scale)
        ctx.gate_first = gate_first
        return y

    @staticmethod
    @first_order("rms_norm")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, scale = ctx.saved_tensors
        u, z, d = _wide(x), None if gate is None else _wide(gate), _wide(dy)
        factor = None if z is None else F.silu(z)
        dgate = None
        if factor is not None and ctx.gate_first:
            u = u * factor
        if factor is not None and z is not None and not ctx.gate_first:
            dz = d * u
            dz.mul_(scale)
            if weight is not None:
                dz.mul_(weight)
            dgate = torch.ops.aten.silu_backward(dz, z)
            d = factor.mul_(d)
        D = x.shape[-1]
        product = (d * u).reshape(-1, D)
        # both sums are products with a vector, which are faster than sums over a dimension
        dweight = product.T @ scale.flatten() if ctx.needs_input_grad[2] else None
        ones = product.new_ones(D) if weight is None else weight.to(product.dtype)
        along = (product @ ones).view(scale.shape)
        du = d * scale
        if weight is not None:
            du.mul_(weight)
        du.addcmul_(u, along.mul_(scale**3).div_(-D))
        if factor is not None and z is not None and ctx.gate_first:
            dgate = torch.ops.aten.silu_backward(du * _wide(x), z)
            du = du.mul_(factor)
        return (
            du.to(x.dtype),
            None if dgate is None else dgate.to(x.dtype),
            None if dweight is None or weight is None else dweight.to(weight.dtype),
            None,
            None,
        )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in WIDE else x.to(torch.promote_types(x.dtype, torch.float32))


def _scale(u: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(u^2) + eps), (..., 1)."""
    norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    scale: Tensor = norm.square_().div_(u.shape[-1]).add_(eps).rsqrt_()
    return scale
