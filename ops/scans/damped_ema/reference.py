"""The definition of the damped moving average, one step at a time."""

import torch
from torch import Tensor


def damped_ema_reference(
    x: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h_t = a * h_{t-1} + b * x_t, y_t = sum_n c_n * h_t[n]; x (B, T, D), a, b, c (D, N), state (B, D, N)."""
    h, ys = state, []
    for x_t in x.unbind(1):
        h = a * h + b * x_t.unsqueeze(-1)  # (B, D, N)
        ys.append((c * h).sum(-1))
    return torch.stack(ys, dim=1) if ys else x, h  # (B, T, D), (B, D, N)
