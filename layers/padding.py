"""Padding, defined once: it is taken out, and the rows run as packed documents.

So a padded step is the identity on every state, on either side, and in both directions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops import shard


class Rows(NamedTuple):
    """The tokens of a padded batch. mask: (B, T) bool, True for tokens; cu_seqlens: (B + 1,), of the packed row."""

    mask: Tensor
    cu_seqlens: Tensor

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (1, number of tokens, ...)."""
        return x[self.mask][None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, number of tokens, ...) -> (B, T, ...), zeros at the padding."""
        padded = x.new_zeros(*self.mask.shape, *x.shape[2:])
        padded[self.mask] = x[0]
        return padded


def unpadded(tokens: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Rows | None:
    """How to take the padding out of a batch; None when there is none.

    Raises:
        ValueError: the mask is not of the tokens' shape, goes with cu_seqlens, or time is cut across ranks.
    """
    if cu_seqlens is not None or mask.shape != tokens.shape:
        raise ValueError(
            f"mask must be (B, T) = {tuple(tokens.shape)} and goes without cu_seqlens; got {tuple(mask.shape)}"
        )
    shard.refuse("A padded batch")
    mask = mask.bool()
    if mask.all():
        return None
    lengths = torch.cat([mask.new_zeros(1, dtype=torch.long), mask.sum(dim=1)])
    return Rows(mask, lengths.cumsum(0))
