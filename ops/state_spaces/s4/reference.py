"""The definitions: linear time-invariant systems, one step at a time."""

import torch
from torch import Tensor

from zoo.ops.core.pairs import as_complex, as_pairs


def s4d_reference(
    u: Tensor, state: Tensor, log_A: Tensor, B: Tensor, C: Tensor, D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x_t = exp(log_A) * x_{t-1} + B u_t, y_t = 2 Re sum_n C x_t + D u_t; all in the dtype of state, (B, H, N, 2)."""
    a, b, c = (as_complex(p.to(state.dtype)) for p in (log_A, B, C))  # (H, N)
    a, x, out = a.exp(), as_complex(state), []
    for u_t in u.to(state.dtype).unbind(1):  # (B, H)
        x = a * x + b * u_t.unsqueeze(-1)
        y_t = 2 * (c * x).real.sum(-1)
        out.append(y_t if D is None else y_t + D.to(state.dtype) * u_t)
    return torch.stack(out, dim=1).to(u.dtype), as_pairs(x)


def s4_reference(
    u: Tensor, state: Tensor, A: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x' = (diag(A) - P P^*) x + B u with all conjugates written out, by the bilinear rule; state (B, H, N, 2)."""
    wide = state.dtype

    def paired(p: Tensor) -> Tensor:  # (H, N, 2) -> (H, 2N) complex, the conjugates in the second half
        z = as_complex(p.to(wide))
        return torch.cat([z, z.conj()], dim=-1)

    a, p, b, c = (paired(x) for x in (A, P, B, C))
    half = dt.to(wide)[:, None, None] / 2
    M = torch.diag_embed(a) - p.unsqueeze(-1) * p.conj().unsqueeze(-2)
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    A_bar = torch.linalg.solve(eye - half * M, eye + half * M)
    B_bar = torch.linalg.solve(eye - half * M, 2 * half * b.unsqueeze(-1)).squeeze(-1)
    x, out = torch.cat([as_complex(state), as_complex(state).conj()], dim=-1), []  # (B, H, 2N)
    for u_t in u.to(wide).unbind(1):  # (B, H)
        x = (A_bar @ x.unsqueeze(-1)).squeeze(-1) + B_bar * u_t.unsqueeze(-1)
        y_t = (c * x).sum(-1).real
        out.append(y_t if D is None else y_t + D.to(wide) * u_t)
    return torch.stack(out, dim=1).to(u.dtype), as_pairs(x[..., : state.shape[-2]])
