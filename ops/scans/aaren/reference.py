"""The definition of Aaren's attention, one token at a time."""

import torch
from torch import Tensor

from zoo.ops.core.algebra import LogSumExp


def aaren_reference(s: Tensor, v: Tensor, state: LogSumExp) -> tuple[Tensor, LogSumExp]:
    """o_t = w_t / u_t; s (B, T, H), v (B, T, H, V) with T at least 1, state m, u (B, H) and w (B, H, V), one dtype."""
    m, u, w = state
    outputs = []
    for s_t, v_t in zip(s.unbind(1), v.unbind(1), strict=True):  # (B, H), (B, H, V)
        largest = torch.maximum(m, s_t)
        kept, taken = torch.exp(m - largest), torch.exp(s_t - largest)
        m, u = largest, kept * u + taken
        w = kept.unsqueeze(-1) * w + taken.unsqueeze(-1) * v_t
        outputs.append(w / u.unsqueeze(-1))
    return torch.stack(outputs, dim=1), LogSumExp(m, u, w)  # (B, T, H, V)
