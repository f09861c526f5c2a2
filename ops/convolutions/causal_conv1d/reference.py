"""The definition: each output is a weighted sum of W inputs of its channel, `dilation` steps apart."""

import torch
from torch import Tensor


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: str | None, dilation: int = 1
) -> tuple[Tensor, Tensor]:
    """y_t = act(bias + sum_w weight[:, w] * x_{t - (W-1-w) dilation}), one step at a time; the last tap is now."""
    tail, ys = state, []  # tail: the last (W - 1) dilation inputs, (B, R, D)
    for t in range(x.shape[1]):
        window = torch.cat([tail, x[:, t : t + 1]], dim=1)  # (B, R + 1, D)
        y = (window[:, ::dilation] * weight.T).sum(dim=1)
        if bias is not None:
            y = y + bias
        ys.append(y * torch.sigmoid(y) if activation == "silu" else y)
        tail = window[:, 1:]
    return torch.stack(ys, dim=1) if ys else x, tail  # (B, T, D), (B, R, D)
