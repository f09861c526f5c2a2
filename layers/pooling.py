"""One vector for every sequence, of a batch, of padded rows or of packed documents, and of time that is cut."""

from typing import Literal

import torch
from torch import Tensor

from zoo.ops import shard

Pooling = Literal["first", "mean"]


def pooled(x: Tensor, pooling: Pooling, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """The first vector of every sequence, or the mean over its tokens.

    Args:
        x: (B, T, D), zeros at the padding.
        pooling: "first" or "mean".
        mask: (B, T) bool, True for tokens; all are when omitted.
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1.

    Returns:
        (B, D) or (n, D), zeros for a sequence without tokens. Where time is cut across ranks every rank gets those of
        all whole sequences, n being the documents of the whole stream.

    Raises:
        ValueError: the ranks do not hold the shard's length, or packed documents without the shard's.

    Cost: across ranks, (P - 1) (B, D) and the mask received.
    """
    place = shard.current()
    if place is not None:
        return _across(x, pooling, mask, cu_seqlens, place)
    if cu_seqlens is not None:
        return _of_documents(x[0], pooling, cu_seqlens)
    if mask is None:
        return x[:, 0] if pooling == "first" else x.mean(dim=1)
    if pooling == "first":  # a row without tokens is zeros everywhere
        return x[torch.arange(len(x), device=x.device), mask.long().argmax(dim=1)]
    return x.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def _of_documents(x: Tensor, pooling: Pooling, cu_seqlens: Tensor) -> Tensor:
    lengths = cu_seqlens.diff().long()
    if pooling == "first":
        first = x[cu_seqlens[:-1].long().clamp(max=len(x) - 1)]
        return first * (lengths > 0).unsqueeze(-1)
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths, output_size=len(x))
    sums = x.new_zeros(len(lengths), x.shape[1]).index_add(0, owner, x)
    return sums / lengths.clamp(min=1).unsqueeze(-1)


def _across(
    x: Tensor, pooling: Pooling, mask: Tensor | None, cu_seqlens: Tensor | None, place: shard.SequenceShard
) -> Tensor:
    """Every rank's share of the sums, added up."""
    at = shard.positions(place, x.shape[1], x.device)  # in the own document
    if cu_seqlens is not None:
        if place.documents is None:
            raise ValueError(
                "pooling of packed documents that are cut across ranks needs the boundaries of all; give SequenceShard "
                "documents"
            )
        lengths = torch.tensor(place.documents, device=x.device).diff()
        owner = shard.owners(place, x.shape[1], x.device)
        taken = x[0] * (at == 0).unsqueeze(-1) if pooling == "first" else x[0]
        sums = x.new_zeros(len(lengths), x.shape[2]).index_add(0, owner, taken)
    else:
        if mask is None:
            length = x.shape[1] * place.size if place.length is None else place.length
            first, lengths = at.new_zeros(len(x)), at.new_full((len(x),), length)
        else:
            everyone = shard.whole(mask, place)
            first, lengths = everyone.long().argmax(dim=1), everyone.sum(dim=1)
        sums = (x * (at == first.unsqueeze(-1)).unsqueeze(-1)).sum(dim=1) if pooling == "first" else x.sum(dim=1)
    summed = shard.total(sums)
    return summed if pooling == "first" else summed / lengths.clamp(min=1).unsqueeze(-1)
