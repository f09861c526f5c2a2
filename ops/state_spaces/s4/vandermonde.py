"""Sums of powers, K_l = 2 Re sum_n w_n exp(l z_n), and their transposes, without a number for every (n, l).

With l = c R + r, exp(l z) = exp(c R z) exp(r z): about 2 sqrt(L) exponentials a mode in place of L, and one matrix
product over the modes. A step is a whole number, so that only the phase modulo 2 pi matters: it is reduced in float64
before it is multiplied, and long sequences lose nothing to the rounding of large angles.
"""

import math

import torch
from torch import Tensor

from zoo.ops.core.pairs import as_complex, as_pairs


def times(z: Tensor, steps: int) -> Tensor:
    """z (..., 2), times a whole number of steps, its phase brought into [-pi, pi]."""
    turned = torch.remainder(z[..., 1].double() * steps + math.pi, 2 * math.pi) - math.pi
    return torch.stack([z[..., 0] * steps, turned.to(z.dtype)], dim=-1)


def powers(z: Tensor, n: int) -> Tensor:
    """exp(l z) for l = 0 ... n - 1, (..., n) complex; z (..., 2) as `times` returns it."""
    return torch.exp(as_complex(z).unsqueeze(-1) * torch.arange(n, device=z.device, dtype=z.dtype))


def cut(length: int) -> tuple[int, int]:
    """R and the number of pieces of R steps: R is a power of two near the root."""
    R = 1 << (max(1, length - 1).bit_length() + 1) // 2
    return R, -(-length // R)


def vandermonde(z: Tensor, w: Tensor, length: int) -> Tensor:
    """z (H, N, 2), real parts <= 0; w (n, H, N, 2) -> K (n, H, L)."""
    R, pieces = cut(length)
    right = powers(times(z, 1), R)  # (H, N, R)
    left = as_complex(w).unsqueeze(-1) * powers(times(z, R), pieces)  # (n, H, N, pieces)
    n, H = w.shape[:2]
    left = torch.cat([left.real, -left.imag], dim=2).permute(1, 0, 3, 2).flatten(1, 2)  # (H, n * pieces, 2N)
    K = 2 * left @ torch.cat([right.real, right.imag], dim=1)  # (H, n * pieces, R)
    return K.view(H, n, pieces * R).transpose(0, 1)[..., :length]


def vandermonde_transposed(z: Tensor, u: Tensor) -> Tensor:
    """sum_l exp((L - 1 - l) z) u_l: what inputs leave behind; z (H, N, 2), u (n, L, H) -> (n, H, N, 2)."""
    n, L, H = u.shape
    R, pieces = cut(L)
    u = torch.cat([u.new_zeros(n, pieces * R - L, H), u], dim=1)
    right = powers(times(z, 1), R).flip(-1)  # (H, N, R), the last input counts as it is
    rows = u.view(n, pieces, R, H).permute(3, 0, 1, 2).flatten(1, 2)  # (H, n * pieces, R)
    inside = rows @ torch.cat([right.real, right.imag], dim=1).mT  # (H, n * pieces, 2N)
    inside = inside.view(H, n, pieces, 2, -1).movedim(3, -1)  # (H, n, pieces, N, 2)
    left = powers(times(z, R), pieces).flip(-1).mT  # (H, pieces, N)
    return as_pairs((as_complex(inside.contiguous()) * left.unsqueeze(1)).sum(2)).transpose(0, 1)
