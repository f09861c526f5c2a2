"""The definition: every channel, a complex number, is multiplied and added to, one step at a time."""

import torch
from torch import Tensor


def complex_affine_scan_reference(a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = a_t * h_{t-1} + b_t on pairs, written out; a, b (B, T, ..., 2), state (B, ..., 2), in its dtype."""
    h, out = state, []
    for a_t, b_t in zip(*(x.to(state.dtype).unbind(1) for x in (a, b)), strict=True):
        re = a_t[..., 0] * h[..., 0] - a_t[..., 1] * h[..., 1]
        im = a_t[..., 0] * h[..., 1] + a_t[..., 1] * h[..., 0]
        h = torch.stack([re, im], dim=-1) + b_t
        out.append(h)
    return torch.stack(out, dim=1).to(b.dtype) if out else torch.zeros_like(b), h
