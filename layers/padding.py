"""Padding, defined once: it is taken out, and the rows run as packed documents.

Where time is cut across ranks that would be no one stretch of time: there each row runs by itself, its padding as a
document. So a padded step is the identity on every state, on either side, and in both directions.
"""

from dataclasses import replace
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
    _check(tokens, mask, cu_seqlens)
    shard.refuse("A padded batch")
    mask = mask.bool()
    if mask.all():
        return None
    lengths = torch.cat([mask.new_zeros(1, dtype=torch.long), mask.sum(dim=1)])
    return Rows(mask, lengths.cumsum(0))


RowsApart = list[tuple[shard.SequenceShard, Tensor]]


def rows_apart(tokens: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> RowsApart | None:
    """How to run a padded batch whose time is cut across ranks: each row alone, as its tokens and the padding packed.

    Returns:
        For each row the place in it, which knows all boundaries, and those of this rank's stretch; None, on all ranks,
        when there is no padding on any.

    Raises:
        ValueError: the mask is not of the tokens' shape, goes with cu_seqlens, has padding between tokens, or the
            shard's layout is not contiguous.

    Cost: the whole mask received by every rank; the rows' messages are sent one row after the other.
    """
    place = shard.current()
    assert place is not None
    _check(tokens, mask, cu_seqlens)
    place.require_contiguous("a padded batch")
    everyone = shard.whole(mask.bool(), place)
    if everyone.all():
        return None
    length, places = everyone.shape[1], []
    for row in everyone.cpu():
        there = row.nonzero().flatten().tolist()
        first, last = (there[0], there[-1] + 1) if there else (0, 0)
        if last - first != len(there):
            raise ValueError(
                "a padded batch that is cut across ranks has padding on either side only; got some between tokens, "
                "give such rows as packed documents"
            )
        cuts = tuple(sorted({0, first, last, length}))
        local = shard.local_boundaries(torch.tensor(cuts), place.rank, place.size, length).cu_seqlens
        places.append((replace(place, length=length, documents=cuts), local.to(tokens.device)))
    return places


def _check(tokens: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None or mask.shape != tokens.shape:
        raise ValueError(
            f"mask must be (B, T) = {tuple(tokens.shape)} and goes without cu_seqlens; got {tuple(mask.shape)}"
        )
