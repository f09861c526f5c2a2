"""Philox-4x32-10 in torch: words of 32 bits in int64, whose products wrap around and keep their 64 bits."""

import torch
from torch import Tensor

from zoo.ops.token_wise.dropout.reference import LOW, MULTIPLIERS, ROUNDS, WEYL


def philox_words(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: int) -> list[Tensor]:
    """As `reference.philox` over counters that broadcast, int64 below 2**32: the first two rounds stay as small as
    their counters are."""
    k0, k1 = key & LOW, key >> 32
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) & LOW ^ c1 ^ k0, p1 & LOW, (p0 >> 32) & LOW ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return [c0, c1, c2, c3]


def keep_mask(D: int, least: int, seed: int, stream: int, at: Tensor) -> Tensor:
    """(B, T, D) bool, True where a number stays; at (2, B, T): the row and the position of every token."""
    rows, positions = at.unsqueeze(-1)
    groups = torch.arange(-(-D // 4), device=at.device)
    words = philox_words(groups, positions, rows, torch.full_like(groups[:1], stream), seed)
    return torch.stack([word >= least for word in words], dim=-1).flatten(2)[..., :D]
