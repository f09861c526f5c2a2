"""The definition: two numbers per channel, mixed by a 2x2 block at every step."""

import torch
from torch import Tensor


def block_affine_scan_reference(A: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = A_t h_{t-1} + b_t; A (B, T, ..., 2, 2), b (B, T, ..., 2), state (B, ..., 2), in the dtype of state."""
    h, out = state, []
    # unbind, not A[:, t]: the gradient of an index is as large as A, at every step
    for A_t, b_t in zip(*(x.to(state.dtype).unbind(1) for x in (A, b)), strict=True):
        h = torch.einsum("...ij,...j->...i", A_t, h) + b_t
        out.append(h)
    return torch.stack(out, dim=1).to(b.dtype) if out else torch.zeros_like(b), h
