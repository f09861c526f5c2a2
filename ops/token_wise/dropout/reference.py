"""The definition: Philox-4x32-10 by its four lines, and a word of it for every number of x."""

import torch
from torch import Tensor

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
LOW = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: int) -> tuple[int, int, int, int]:
    """Four words of 32 random bits for a counter of four words and a key of 64 bits (Salmon et al., SC 2011)."""
    (c0, c1, c2, c3), k0, k1 = counter, key & LOW, key >> 32
    for _ in range(ROUNDS):
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & LOW, (p0 >> 32) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return c0, c1, c2, c3


def dropout_reference(x: Tensor, least: int, scale: float, seed: int, stream: int, at: Tensor) -> Tensor:
    """y = scale * x where the number's own word is at least `least`, else 0; number by number."""
    B, T, D = x.shape
    rows, positions = at.tolist()
    kept = [
        [
            [philox((d // 4, positions[b][t], rows[b][t], stream), seed)[d % 4] >= least for d in range(D)]
            for t in range(T)
        ]
        for b in range(B)
    ]  # fmt: skip
    mask = torch.tensor(kept, dtype=torch.bool, device=x.device).view(B, T, D)
    return torch.where(mask, x * scale, torch.zeros_like(x))
