"""The definition: every output is a sum over the past."""

import torch
from torch import Tensor


def fft_convolution_reference(u: Tensor, k: Tensor, D: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y_t = sum_l k[:, l] * u_{t-l} + D * u_t; u (B, T, D), k (D, L), D (D,); sums in `dtype`."""
    wide, taps, out = u.to(dtype), k.to(dtype), []
    for t in range(u.shape[1]):
        past = wide[:, max(0, t + 1 - k.shape[1]) : t + 1].flip(1)  # (B, up to L, D), newest first
        out.append((past * taps[:, : past.shape[1]].T).sum(dim=1))
    y = torch.stack(out, dim=1)
    return (y if D is None else y + D.to(dtype) * wide).to(u.dtype)
