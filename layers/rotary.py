"""Rotary position embedding, in the half-split layout of LLaMA and GPT-NeoX."""

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, size: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, (..., size / 2) in float32, of positions * base**(-2m / size)."""
    frequencies = base ** (-torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size)
    angles = positions.unsqueeze(-1).float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[m], x[m + K/2]) of (B, T, H, K) by the angles whose cos and sin are (B or 1, T, K/2)."""
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)  # (B, T, 1, K / 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
