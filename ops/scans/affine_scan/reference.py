"""The definition: every channel is multiplied and added to, one step at a time."""

import torch
from torch import Tensor


def affine_scan_reference(a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = a_t * h_{t-1} + b_t elementwise; a, b (B, T, ...), state (B, ...), in the dtype of state."""
    h, out = state, []
    # unbind, not a[:, t]: the gradient of an index is as large as a, at every step
    for a_t, b_t in zip(*(x.to(state.dtype).unbind(1) for x in (a, b)), strict=True):  # (B, ...)
        h = a_t * h + b_t
        out.append(h)
    return torch.stack(out, dim=1).to(b.dtype) if out else torch.zeros_like(b), h
