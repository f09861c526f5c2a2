"""An output that stays in the graph of everything it was asked of, though it depends on none of it."""

from typing import Any

import torch
from torch import Tensor

from zoo.ops.core.autograd import apply


def tied(y: Tensor, *inputs: Tensor | None) -> Tensor:
    """y, as a function of the inputs with zero gradients.

    A rank whose stretch of time is empty computes nothing, so its output would hang on no exchange: autograd would
    never ask for that exchange's backward, and the neighbours would wait for its message forever.

    Args:
        y: the output of an empty stretch, any shape.
        inputs: what the output of a stretch with tokens depends on; what arrived from other ranks above all. None and
            integer tensors are passed over.

    Returns:
        y, in memory that it shares with the given one.

    Cost: none; the backward makes zeros in the inputs' shapes.
    """
    differentiable = [x for x in inputs if x is not None and (x.is_floating_point() or x.is_complex())]
    made: Tensor = apply(_Tied, y, *differentiable)
    return made


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *inputs: Tensor) -> Tensor:
        ctx.shapes = [(x.shape, x.dtype, x.device) for x in inputs]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(ctx.shapes, ctx.needs_input_grad[1:], strict=True)
        return dy, *(torch.zeros(s, dtype=t, device=d) if needed else None for (s, t, d), needed in wanted)
