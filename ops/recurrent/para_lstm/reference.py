"""The definition of the LSTM with diagonal recurrent matrices and peepholes."""

import torch
from torch import Tensor


def para_lstm_reference(u: Tensor, keep: Tensor, state: Tensor, a: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """u (B, T, 3, D) for f, o, z; keep (B, T), 0 where an episode begins; state (B, D, 2): c, h; a (3, D), p (2, D).

    All states, (B, T, D, 2), and the last.
    """
    c, h = state.unbind(-1)
    states = []
    a, p = a.to(h.dtype), p.to(h.dtype)
    for t, u_t in enumerate(u.to(h.dtype).unbind(1)):
        u_f, u_o, u_z = u_t.unbind(1)
        c, h = keep[:, t, None] * c, keep[:, t, None] * h
        f = torch.sigmoid(a[0] * h + p[0] * c + u_f)
        z = torch.tanh(a[2] * h + u_z)
        c = f * c + (1 - f) * z
        o = torch.sigmoid(a[1] * h + p[1] * c + u_o)
        h = o * torch.tanh(c)
        states.append(torch.stack([c, h], dim=-1))
    return torch.stack(states, dim=1).to(u.dtype), states[-1]
