"""The definition of Elman's network with a recurrent matrix for each head."""

import torch
from torch import Tensor


def elman_reference(x: Tensor, R: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = tanh(x_t + R h_{t-1} + b)."""
    (h,) = state.unbind(1)
    hs = []
    for x_t in x.unbind(1):
        h = (x_t + torch.einsum("ghpq,bhq->bghp", R, h) + b).squeeze(1).tanh()  # (B, H, D)
        hs.append(h)
    return torch.stack(hs, dim=1), h.unsqueeze(1)  # (B, T, H, D), (B, 1, H, D)
