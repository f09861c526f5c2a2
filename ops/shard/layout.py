"""Which tokens a rank holds, in which documents they lie, and at which positions they stand."""

import bisect
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops.shard.sequence_shard import SequenceShard


def stretch(length: int, rank: int, size: int, chunk: int = 1) -> tuple[int, int]:
    """The tokens of a rank when `length` tokens are cut into `size` stretches as even as can be: [left, right).

    Cuts are multiples of the chunk.
    """
    chunks = -(-length // chunk)
    return min(length, chunk * (chunks * rank // size)), min(length, chunk * (chunks * (rank + 1) // size))


def token_indices(length: int, rank: int, size: int, layout: str = "contiguous", chunk: int = 1) -> Tensor:
    """Which of `length` tokens a rank holds, in the order in which it holds them, int64; `chunk` as in `stretch`.

    Raises:
        ValueError: a zigzag layout of a length that 2 * size does not divide, or a striped one that size does not.
    """
    if layout == "contiguous":
        return torch.arange(*stretch(length, rank, size, chunk))
    parts = size if layout == "striped" else 2 * size
    if length % parts:
        raise ValueError(
            f"a {layout} layout over {size} ranks needs a length that is a multiple of {parts}; got {length}, pad the "
            "sequence or use a contiguous attention method such as 'lightseq' or 'ulysses'"
        )
    if layout == "striped":
        return torch.arange(rank, length, size)
    chunks = torch.arange(length).view(parts, -1)
    return torch.cat([chunks[rank], chunks[parts - 1 - rank]])


def positions(shard: SequenceShard, tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """The position of each of this rank's `tokens` in its own document, int64.

    Raises:
        ValueError: the rank does not hold `tokens` of the shard's `length`, or the place is reversed.
    """
    own = tokens_of(shard, tokens)
    if shard.documents is not None:
        own = own - torch.tensor(shard.documents[:-1])[_owners(shard, own)]
    return own.to(device)


def owners(shard: SequenceShard, tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """Of which of the shard's `documents` each of this rank's `tokens` is a part, int64; 0 where there are none.

    Raises:
        ValueError: as `positions`.
    """
    own = tokens_of(shard, tokens)
    return (torch.zeros_like(own) if shard.documents is None else _owners(shard, own)).to(device)


def _owners(shard: SequenceShard, own: Tensor) -> Tensor:
    assert shard.documents is not None
    return torch.searchsorted(torch.tensor(shard.documents[:-1]), own, right=True) - 1


def tokens_of(shard: SequenceShard, tokens: int) -> Tensor:
    """Which tokens of the whole sequence this rank's `tokens` are, int64.

    Raises:
        ValueError: as `positions`.
    """
    shard.require_forward("positions")
    length = tokens * shard.size if shard.length is None else shard.length
    own = token_indices(length, shard.rank, shard.size, shard.layout or "contiguous", shard.chunk)
    if len(own) != tokens:
        raise ValueError(
            f"rank {shard.rank} of {shard.size} holds {len(own)} of {length} tokens; got {tokens}, give SequenceShard "
            "the length of the whole sequence"
        )
    return own


class LocalBoundaries(NamedTuple):
    """One rank's view of packed documents.

    cu_seqlens: (n + 1,), the boundaries inside the rank's stretch.
    continues: the first local document has tokens on earlier ranks.
    documents: which of all documents each local one is a part of; the leading empty one that says "nothing goes on
        from before" counts as a part of the document before it.
    """

    cu_seqlens: Tensor
    continues: bool
    documents: tuple[int, ...]


def local_boundaries(cu_seqlens: Tensor, rank: int, size: int, length: int) -> LocalBoundaries:
    """The documents on a rank's stretch of the flattened stream of `length` tokens, cut as `stretch` cuts.

    Empty documents vanish; a document that is only passing through a rank without tokens stays, so that its state does.
    """
    left, right = stretch(length, rank, size)
    cuts = cu_seqlens.tolist()
    if cuts[0] != 0 or cuts[-1] != length:
        raise ValueError(
            f"local_boundaries: cu_seqlens must start at 0 and end at the length {length}; got {cuts[0]} and {cuts[-1]}"
        )
    inside = [c for c in sorted(set(cuts)) if left < c < right]
    fresh = 0 < left < length and left in cuts  # a document begins at the left edge
    local = [left, *([left] if fresh else []), *inside, right]
    # a document is named by its last start at or before its first token
    documents = [bisect.bisect_right(cuts, min(start, length - 1)) - 1 for start in local[:-1]]
    if fresh:
        documents[0] -= 1
    boundaries = torch.tensor([c - left for c in local], dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return LocalBoundaries(boundaries, left > 0 and not fresh, tuple(documents))
