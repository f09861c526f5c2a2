"""The definition of the GRU with a recurrent matrix for each head."""

import torch
from torch import Tensor


def gru_reference(x: Tensor, R: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """r, z = sig(x_t + R h_{t-1} + b); h_t = z h_{t-1} + (1 - z) tanh(x_n + b_n + r (R_g h_{t-1} + b_g))."""
    (h,) = state.unbind(1)
    b_g, b_r, b_z, b_n = b.unbind(0)
    hs = []
    for x_t in x.unbind(1):
        x_r, x_z, x_n = x_t.unbind(1)
        g, r, z = torch.einsum("ghpq,bhq->bghp", R, h).unbind(1)  # (B, H, D) each
        r, z = (x_r + r + b_r).sigmoid(), (x_z + z + b_z).sigmoid()
        h = z * h + (1 - z) * (x_n + b_n + r * (g + b_g)).tanh()
        hs.append(h)
    return torch.stack(hs, dim=1), h.unsqueeze(1)  # (B, T, H, D), (B, 1, H, D)
