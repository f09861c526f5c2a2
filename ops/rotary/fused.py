"""Fast torch form: four products written where they belong; the backward pass turns the other way."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotary_fused(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, T, H, K), tables (B or 1, T, K / 2) -> as x."""
    return _Rotary.apply(x, cos, sin, interleaved)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        learned = any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(x if learned else None, cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, interleaved, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin = ctx.saved_tensors
        dx = _turn(dy, cos, sin, ctx.interleaved, 1) if ctx.needs_input_grad[0] else None
        dcos, dsin = (None, None) if x is None else table_gradients(dy, x, cos, ctx.interleaved)
        return dx, dcos, dsin, None


def table_gradients(dy: Tensor, x: Tensor, table: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Gradients of cos and sin, for tables that are learned."""
    (a, b), (da, db) = halves(x.to(table.dtype), interleaved), halves(dy.to(table.dtype), interleaved)
    dcos, dsin = (a * da + b * db).sum(-2), (a * db - b * da).sum(-2)
    return dcos.sum_to_size(table.shape), dsin.sum_to_size(table.shape)


def halves(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second numbers of all pairs, as views."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: int) -> Tensor:
    """(a, b) -> (a cos + sign b sin, b cos - sign a sin)."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    wide = x.to(cos.dtype)
    y = torch.empty_like(wide, memory_format=torch.contiguous_format)
    (a, b), (ya, yb) = halves(wide, interleaved), halves(y, interleaved)
    torch.mul(a, cos, out=ya).addcmul_(b, sin, value=sign)
    torch.mul(b, cos, out=yb).addcmul_(a, sin, value=-sign)
    return y.to(x.dtype)
