"""Who sees whom: which tokens each seat holds, and which keys of one seat the queries of another see.

A query sees one interval of its sequence, whatever the mask: its document, cut by causality and by the window. A seat
holds its tokens in increasing order, so that the interval is one of the seat's keys as well, and a mask is two integers
for each query. Who sees nobody follows, and how much work a block is, without a mask being built.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops.core.cached import cached_tensors
from zoo.ops.shard import token_indices


class Block(NamedTuple):
    """Queries rows[0] ... rows[1] - 1 of a seat and keys columns[0] ... columns[1] - 1 of one: all who see or are seen.

    begin, end: query rows[0] + i sees keys columns[0] + begin[i] ... columns[0] + end[i] - 1; on the CPU, int64. One
        that sees none of them has begin = the number of columns and end = 0.
    pairs: queries and keys that see each other.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    begin: Tensor
    end: Tensor
    pairs: int


class View:
    """The tokens of all seats and the mask. A seat is one rank, or the neighbours that share out heads."""

    def __init__(
        self,
        seats: tuple[Tensor, ...],
        length: int,
        documents: tuple[int, ...] | None,
        causal: bool,
        window: int | None,
    ):
        self.seats, self.length, self.causal = seats, length, causal
        token = torch.arange(length)
        first, last = torch.zeros_like(token), torch.full_like(token, length)
        if documents is not None:
            cuts = torch.tensor(documents)
            document = torch.searchsorted(cuts, token, right=True)
            first, last = cuts[document - 1], cuts[document]
        if window is not None:
            first = torch.maximum(first, token - window + 1)
            last = torch.minimum(last, token + window)
        if causal:
            last = torch.minimum(last, token + 1)
        self._first, self._last = first, last  # token t sees first[t] ... last[t] - 1
        self._blocks: dict[tuple[int, int | None], Block | None] = {}

    def tokens(self, seat: int) -> int:
        """How many tokens a seat of the group holds."""
        return len(self.seats[seat])

    def block(self, queries: int, keys: int | None) -> Block | None:
        """Queries of one seat and keys of another, or all keys in order of time; None if nobody sees anything."""
        pair = queries, keys
        if pair not in self._blocks:
            self._blocks[pair] = self._block(queries, keys)
        return self._blocks[pair]

    def _block(self, queries: int, keys: int | None) -> Block | None:
        here = self.seats[queries]
        begin, end = self._first[here], self._last[here]
        if keys is not None:
            there = self.seats[keys]
            begin, end = torch.searchsorted(there, begin), torch.searchsorted(there, end)
        seen = begin < end
        if not seen.any():
            return None
        rows = seen.nonzero()
        top, bottom = int(rows[0]), int(rows[-1]) + 1
        left, right = int(begin[seen].min()), int(end[seen].max())
        begin, end, seen = begin[top:bottom], end[top:bottom], seen[top:bottom]
        pairs = int((end - begin)[seen].sum())
        begin = torch.where(seen, begin - left, right - left)
        end = torch.where(seen, end - left, 0)
        return Block((top, bottom), (left, right), begin, end, pairs)


@cached_tensors()
def view(
    length: int, size: int, layout: str, documents: tuple[int, ...] | None, causal: bool, window: int | None, inner: int
) -> View:
    """Of `length` tokens over `size` ranks; `inner` neighbouring ranks sit together."""
    tokens = [token_indices(length, rank, size, layout) for rank in range(size)]
    seats = (torch.cat(tokens[i : i + inner]) for i in range(0, size, inner))
    return View(tuple(seat.sort().values for seat in seats), length, documents, causal, window)
