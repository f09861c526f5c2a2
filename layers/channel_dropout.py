"""Dropout that drops the same channels at every time of a sequence."""

import torch
from torch import Tensor

from zoo.layers.dropout import Dropout, draw_seed
from zoo.ops import dropout, shard


class ChannelDropout(Dropout):
    """Drop whole channels of a sequence, (B, T, D) -> (B, T, D); each packed document draws its own.

    Noise that changes from step to step would be averaged away by a long memory, or forbid it. A sequence that is cut
    in time draws once for every piece; where ranks share it they draw alike.

    Args:
        p: the share of channels that is dropped; the others are scaled by 1 / (1 - p).
    """

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """x (B, T, D) with whole channels of a row dropped in training, the same over all of its time."""
        if not self.training or self.p == 0:
            return x
        if cu_seqlens is None:
            rows = torch.arange(len(x), device=x.device)
            return x * self._kept(x, rows).unsqueeze(1)
        documents, owner = torch.unique_consecutive(_owners(x, cu_seqlens), return_inverse=True)
        return x * self._kept(x, documents)[owner]

    def _kept(self, x: Tensor, numbers: Tensor) -> Tensor:
        """0 or 1 / (1 - p) of every channel for sequences by number, (n, D)."""
        at = torch.stack([numbers, torch.zeros_like(numbers)]).unsqueeze(-1)
        ones = x.new_ones(len(numbers), 1, x.shape[2])
        return dropout(ones, self.p, draw_seed(), stream=self.stream, at=at).squeeze(1)


def _owners(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Of which document each token is a part, of all documents where time is cut across ranks, (T,)."""
    place, T = shard.current(), x.shape[1]
    if place is not None and place.documents is not None:
        return shard.owners(place, T, x.device)
    lengths = cu_seqlens.diff().long()
    return torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths.to(x.device), output_size=T)
