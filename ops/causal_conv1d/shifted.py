"""Fast torch form: W shifted multiply-adds over the whole sequence, with no transposition to (B, D, T)."""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv1d_shifted(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str | None, cuts: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """Every document is preceded by its W - 1 rows of history, so that no tap ever crosses a border."""
    halo, length = weight.shape[1] - 1, x.shape[1]
    if cuts is None:
        history = torch.cat([state.to(x.dtype), x], dim=1)  # (B, W - 1 + T, D)
        y = _taps(history, weight, bias)
        tail = history[:, length:]
    else:
        rows, outputs, tails = [], [], []  # of the stream that `history` is: indices into [x; state]
        for i, (left, right) in enumerate(itertools.pairwise(cuts)):
            rows += [length + i * halo + j for j in range(halo)]
            outputs += range(len(rows) - halo, len(rows) - halo + right - left)
            rows += range(left, right)
            tails += range(len(rows) - halo, len(rows))
        index = torch.tensor([rows], device=x.device)
        stream = torch.cat([x[0], state.flatten(0, 1).to(x.dtype)])  # (T + n (W - 1), D)
        history = stream[index]
        y = _taps(history, weight, bias)[:, torch.tensor(outputs, dtype=torch.long, device=x.device)]
        tail = history[0, torch.tensor(tails, dtype=torch.long, device=x.device)].unflatten(0, state.shape[:2])
    return F.silu(y) if activation == "silu" else y, tail.to(state.dtype)


def _taps(history: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, W - 1 + L, D) -> (B, L, D)."""
    width = weight.shape[1]
    n = history.shape[1] - width + 1
    y = history[:, width - 1 :] * weight[:, width - 1]
    if bias is not None:
        y = y + bias
    for w in range(width - 1):
        y = torch.addcmul(y, history[:, w : w + n], weight[:, w])
    return y
