"""The definition of the GRU with a diagonal recurrent matrix."""

import torch
from torch import Tensor


def para_gru_reference(u: Tensor, keep: Tensor, state: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """u (B, T, 3, D) for z, r, c; keep (B, T), 0 where an episode begins; state (B, D); a (3, D)."""
    h, hs = state, []
    a = a.to(h.dtype)
    for t, u_t in enumerate(u.to(h.dtype).unbind(1)):
        u_z, u_r, u_c = u_t.unbind(1)
        h = keep[:, t, None] * h
        z = torch.sigmoid(a[0] * h + u_z)
        r = torch.sigmoid(a[1] * h + u_r)
        c = torch.tanh(a[2] * (r * h) + u_c)
        h = (1 - z) * h + z * c
        hs.append(h)
    return torch.stack(hs, dim=1).to(u.dtype), h
