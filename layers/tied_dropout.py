"""Dropout that drops the same channels at every time of a sequence."""

import torch
from torch import Tensor, nn


class TiedDropout(nn.Module):
    """Drop whole channels of a sequence, (B, T, D) -> (B, T, D); each packed document draws its own.

    Noise that changes from step to step would be averaged away by a long memory, or forbid it. A sequence that is cut
    in time draws once for every piece.

    Args:
        p: the share of channels that is dropped; the others are scaled by 1 / (1 - p).
    """

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout must be in [0, 1); got {p}")
        self.p = p

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        if not self.training or self.p == 0:
            return x
        rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        kept = torch.empty(rows, x.shape[2], dtype=x.dtype, device=x.device).bernoulli_(1 - self.p) / (1 - self.p)
        if cu_seqlens is None:
            return x * kept.unsqueeze(1)
        return x * kept.repeat_interleave(cu_seqlens.diff(), dim=0)

    def extra_repr(self) -> str:
        return f"p={self.p}"
