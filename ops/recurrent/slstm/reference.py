"""The definition of the sLSTM with a recurrent matrix for each head."""

import torch
from torch import Tensor
from torch.nn import functional as F


def slstm_reference(x: Tensor, R: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """c_t = sig(f) c_{t-1} + exp(i) tanh(z), n_t = sig(f) n_{t-1} + exp(i), both over exp(m_t); h_t = sig(o) c_t / n_t.

    One of the two stabilised gates is 1 exactly, so n is at least 1 in floating point too, and needs no bound.
    """
    h, c, n, m = state.unbind(1)
    hs = []
    for x_t in x.unbind(1):
        i, f, z, o = (x_t + torch.einsum("ghpq,bhq->bghp", R, h) + b).unbind(1)  # (B, H, D) each
        kept = m - F.softplus(-f, threshold=40)  # logsigmoid(f) + m, exact to float64
        m = torch.where((n == 0) | (i > kept), i, kept)  # n is 0 where nothing was written yet
        i, f = (i - m).exp(), (kept - m).clamp(max=0).exp()  # the clamp acts where c and n are 0 only
        c = f * c + i * z.tanh()
        n = f * n + i
        h = o.sigmoid() * c / n
        hs.append(h)
    return torch.stack(hs, dim=1), torch.stack([h, c, n, m], dim=1)  # (B, T, H, D), (B, 4, H, D)
