"""Packed documents as rows of a batch, in few groups of like length: for operators that see a document at once."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops.core.cached import cached_tensors


class Group(NamedTuple):
    """Documents whose lengths lie within a factor of two, each a row that ends at the right edge.

    documents: (n,) which documents; lengths: (n,) their tokens; places: (n, L) the token at each place, or the length
        of the whole stream where a row has not begun. All int64.
    """

    documents: Tensor
    lengths: Tensor
    places: Tensor


@cached_tensors()
def groups(cuts: tuple[int, ...], device: torch.device) -> tuple[Group, ...]:
    """The documents between `cuts`, empty ones left out: at most log2(T) groups, together less than 2 T places."""
    by_size: dict[int, list[int]] = {}
    for i, (left, right) in enumerate(itertools.pairwise(cuts)):
        if left < right:
            by_size.setdefault((right - left - 1).bit_length(), []).append(i)
    made = []
    for documents in by_size.values():
        begin, end = (torch.tensor([cuts[i + j] for i in documents], device=device) for j in range(2))
        width = max(cuts[i + 1] - cuts[i] for i in documents)
        index = end[:, None] - width + torch.arange(width, device=device)
        index = torch.where(index < begin[:, None], cuts[-1], index)
        made.append(Group(torch.tensor(documents, device=device), end - begin, index))
    return tuple(made)


def gather(x: Tensor, group: Group) -> Tensor:
    """(1, T, ...) -> (n, L, ...), zeros before a document begins."""
    return torch.cat([x[0], x.new_zeros(1, *x.shape[2:])])[group.places]


def scatter(rows: Sequence[Tensor], of: Sequence[Group], length: int) -> Tensor:
    """The rows (n, L, ...) of every group back at their places, (1, T, ...)."""
    index = torch.cat([group.places.flatten() for group in of])
    place = index.new_empty(length + 1)
    place[index] = torch.arange(len(index), device=index.device)
    return torch.cat([x.flatten(0, 1) for x in rows])[place[:length]].unsqueeze(0)
