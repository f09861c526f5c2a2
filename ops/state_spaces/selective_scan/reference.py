"""The definition: a diagonal state per channel whose step size, input map and output map depend on the token."""

import torch
from torch import Tensor


def selective_scan_reference(
    u: Tensor, delta: Tensor, B: Tensor, C: Tensor, state: Tensor, A: Tensor, D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t^T and y_t = h_t C_t + D u_t, in the dtype of state."""
    h, A, out = state, A.to(state.dtype), []  # (B, E, N), (E, N)
    # unbind, not u[:, t]: the gradient of an index is as large as u, at every step
    for u_t, d_t, B_t, C_t in zip(*(x.to(h.dtype).unbind(1) for x in (u, delta, B, C)), strict=True):
        h = torch.exp(d_t.unsqueeze(-1) * A) * h + (d_t * u_t).unsqueeze(-1) * B_t.unsqueeze(-2)
        y = torch.einsum("ben,bn->be", h, C_t)
        out.append(y if D is None else y + D.to(h.dtype) * u_t)
    return torch.stack(out, dim=1).to(u.dtype) if out else torch.zeros_like(u), h
