"""A rank that holds no token stays in the graph: where it left, another rank would wait for its backward pass."""

from typing import Any

import torch
from torch import Tensor


def tied(y: Tensor, *inputs: Tensor | None) -> Tensor:
    """y, whose backward pass also goes to `inputs`, with gradients of zero.

    For outputs that a stretch without tokens does not compute. Their gradient must come by every exchange of the
    operator, and every parameter must get one, as on the ranks that hold tokens.

    Args:
        y: any tensor.
        inputs: what y would be made of; None is passed over. Their values are not read, so that NaN does no harm.

    Returns:
        y, differentiable wherever one of them is.
    """
    tied_y: Tensor = _Tied.apply(y, *(x for x in inputs if x is not None))
    return tied_y


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *inputs: Tensor) -> Tensor:
        ctx.like = [(x.shape, x.dtype, x.device) for x in inputs]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        zeros = (
            torch.zeros(shape, dtype=dtype, device=device) if needed else None
            for (shape, dtype, device), needed in zip(ctx.like, ctx.needs_input_grad[1:], strict=True)
        )
        return dy, *zeros
