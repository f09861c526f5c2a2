"""The angles of rotary position embedding; zoo.ops.rotary turns by them."""

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, size: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, (..., size / 2) in float32, of positions * base**(-2m / size)."""
    frequencies = base ** (-torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size)
    angles = positions.unsqueeze(-1).float() * frequencies
    return angles.cos(), angles.sin()
