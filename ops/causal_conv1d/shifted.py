"""Fast torch form: W shifted multiply-adds over the whole sequence, with no transposition to (B, D, T)."""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def causal_conv1d_shifted(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str | None, cuts: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """Every document is preceded by its W - 1 rows of history, so that no tap ever crosses a border."""
    silu = activation == "silu"
    halo, length = weight.shape[1] - 1, x.shape[1]
    if cuts is None:
        history = torch.cat([state.to(x.dtype), x], dim=1)  # (B, W - 1 + T, D)
        y = _Taps.apply(history, weight, bias, silu)
        tail = history[:, length:].clone()  # a view would keep the whole stretch as long as the state lives
    else:
        rows: list[int] = []  # of the stream that `history` is: indices into [x; state]
        outputs: list[int] = []
        tails: list[int] = []
        for i, (left, right) in enumerate(itertools.pairwise(cuts)):
            rows += [length + i * halo + j for j in range(halo)]
            outputs += range(len(rows) - halo, len(rows) - halo + right - left)
            rows += range(left, right)
            tails += range(len(rows) - halo, len(rows))
        index = torch.tensor([rows], device=x.device)
        stream = torch.cat([x[0], state.flatten(0, 1).to(x.dtype)])  # (T + n (W - 1), D)
        history = stream[index]
        y = _Taps.apply(history, weight, bias, silu)[:, torch.tensor(outputs, dtype=torch.long, device=x.device)]
        tail = history[0, torch.tensor(tails, dtype=torch.long, device=x.device)].unflatten(0, state.shape[:2])
    return y, tail.to(state.dtype)


class _Taps(torch.autograd.Function):
    """(B, W - 1 + L, D) -> (B, L, D). Written out, because autograd pads every shifted slice back to full length."""

    @staticmethod
    def forward(ctx: Any, history: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
        width = weight.shape[1]
        n = history.shape[1] - width + 1
        taps = weight.t().contiguous()  # a strided column under every row costs four times as much
        z = history[:, width - 1 :] * taps[width - 1]
        for w in range(width - 1):
            z.addcmul_(history[:, w : w + n], taps[w])
        if bias is not None:
            z.add_(bias)
        ctx.save_for_backward(history, weight, z if silu else None)
        ctx.bias = bias is not None
        return F.silu(z) if silu else z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        history, weight, z = ctx.saved_tensors
        n, width = dy.shape[1], weight.shape[1]
        dz = dy if z is None else torch.ops.aten.silu_backward(dy, z)
        dhistory, taps, dtaps = torch.zeros_like(history), weight.t().contiguous(), []
        for w in range(width):
            dhistory[:, w : w + n].addcmul_(dz, taps[w])
            dtaps.append((dz * history[:, w : w + n]).sum((0, 1)))
        return dhistory, torch.stack(dtaps, dim=1), dz.sum((0, 1)) if ctx.bias else None, None
