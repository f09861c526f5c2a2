"""The definition of the LSTM with a recurrent matrix for each head."""

import torch
from torch import Tensor


def lstm_reference(x: Tensor, R: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """i, f, z, o = x_t + R h_{t-1} + b; c_t = sig(f) c_{t-1} + sig(i) tanh(z); h_t = sig(o) tanh(c_t)."""
    h, c = state.unbind(1)
    hs = []
    for x_t in x.unbind(1):
        i, f, z, o = (x_t + torch.einsum("ghpq,bhq->bghp", R, h) + b).unbind(1)  # (B, H, D) each
        c = f.sigmoid() * c + i.sigmoid() * z.tanh()
        h = o.sigmoid() * c.tanh()
        hs.append(h)
    return torch.stack(hs, dim=1), torch.stack([h, c], dim=1)  # (B, T, H, D), (B, 2, H, D)
