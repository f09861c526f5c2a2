"""The definition: a matrix memory with one decay per head and step, written by B x^T and read by C."""

import torch
from torch import Tensor


def ssd_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T and y_t = S_t^T C_t + D x_t, in the dtype of state."""
    S, out = state, []  # (B, H, N, P)
    repeats = x.shape[2] // B.shape[2]
    A = A.to(S.dtype)
    B, C = B.repeat_interleave(repeats, dim=2), C.repeat_interleave(repeats, dim=2)
    # unbind, not x[:, t]: the gradient of an index is as large as x, at every step
    for x_t, dt_t, B_t, C_t in zip(*(z.to(S.dtype).unbind(1) for z in (x, dt, B, C)), strict=True):
        S = (dt_t * A).exp()[..., None, None] * S + (dt_t.unsqueeze(-1) * B_t).unsqueeze(-1) * x_t.unsqueeze(-2)
        y = torch.einsum("bhnp,bhn->bhp", S, C_t)
        out.append(y if D is None else y + D.to(S.dtype).unsqueeze(-1) * x_t)
    return torch.stack(out, dim=1).to(x.dtype) if out else torch.zeros_like(x), S
