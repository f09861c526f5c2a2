"""The definition: every head mixes time by one explicit T x T matrix."""

import torch
from torch import Tensor


def quasiseparable_matrix(dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """M, (batch, H, T, T): M_ij is how much of token j's input is in token i's output.

    With a_t = exp(dt_t A), in the first direction for i > j and in the second for i < j,

        M_ij = C_{i-1} . B_j dt_j  a_{j+1} ... a_{i-1}      i > j
        M_ij = C_{i+1} . B_j dt_j  a_{i+1} ... a_{j-1}      i < j
        M_ii = D_i

    Args:
        dt, A, B, C, D: as for `quasiseparable`, of one float dtype.
    """
    forward = _below(dt[:, :, 0], A, B[:, :, 0], C[:, :, 0])
    backward = _below(dt[:, :, 1].flip(1), A, B[:, :, 1].flip(1), C[:, :, 1].flip(1)).flip(2, 3)
    return forward + torch.diag_embed(D.transpose(1, 2)) + backward


def _below(dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The part below the diagonal, column by column: dt (B, T, H); B, C (B, T, G, N)."""
    T, H = dt.shape[1:]
    B, C = (z.repeat_interleave(H // z.shape[2], dim=2) for z in (B, C))  # (B, T, H, N)
    a, columns = dt * A, []
    for j in range(T):
        # rows i = j + 1 ... T - 1 read with C_{i-1}, after the decays of the steps j + 1 ... i - 1
        decays = torch.cat([torch.zeros_like(a[:, :1]), a[:, j + 1 : T - 1].cumsum(1)], dim=1).exp()[:, : T - 1 - j]
        written = B[:, j] * dt[:, j].unsqueeze(-1)  # (B, H, N)
        column = torch.einsum("bthn,bhn->bth", C[:, j : T - 1], written) * decays
        columns.append(torch.cat([torch.zeros_like(a[:, : j + 1]), column], dim=1))  # (B, T, H)
    return torch.stack(columns, dim=-1).transpose(1, 2)


def quasiseparable_reference(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """y = M x, head by head, in the dtype of dt."""
    return torch.einsum("bhij,bjhp->bihp", quasiseparable_matrix(dt, A, B, C, D), x.to(dt.dtype))
