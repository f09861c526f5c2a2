"""The definition: each output is a weighted sum of the inputs on both sides of it."""

import torch
from torch import Tensor


def depthwise_conv1d_reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """y_t = act(bias + sum_w weight[:, w] * x_{t - (W-1)//2 + w}), one step at a time; zeros beyond the ends."""
    (_, T, D), W = x.shape, weight.shape[1]
    left, ys = (W - 1) // 2, []
    for t in range(T):
        y = x.new_zeros(len(x), D) if bias is None else bias.expand(len(x), D)
        for w in range(W):
            if 0 <= t - left + w < T:
                y = y + weight[:, w] * x[:, t - left + w]
        ys.append(y * torch.sigmoid(y) if activation == "silu" else y)
    return torch.stack(ys, dim=1)
