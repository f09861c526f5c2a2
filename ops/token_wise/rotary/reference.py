"""The definition: pairs of channels as points of the plane, turned by an angle."""

import torch
from torch import Tensor


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """(a, b) -> (a cos - b sin, a sin + b cos) for pairs of x (B, T, H, K); tables (B or 1, T, K / 2)."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (B or 1, T, 1, K / 2)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)
