"""Sequences side by side, one slab a step: what a loop over time reads and writes lies together.

Rows that have ended are left out, so packed documents of any lengths cost no padding: they are sorted, longest first,
and the rows of a step are the first ones of the step before.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops.core.cached import cached_tensors


class Documents(NamedTuple):
    """Documents that have tokens, longest first.

    row: (n,) which documents, begin: (n,) their first tokens, length: (n,) their numbers of tokens; int64.
    counts: how many of them have a token t, for t = 0, 1, ...
    """

    row: Tensor
    begin: Tensor
    length: Tensor
    counts: tuple[int, ...]


def documents(B: int, T: int, cuts: tuple[int, ...] | None, device: torch.device) -> Documents:
    """Of packed tokens, or of a batch whose rows lie one after the other. T is not 0."""
    return _documents(tuple(range(0, B * T + 1, T)) if cuts is None else cuts, device)


@cached_tensors()
def _documents(cuts: tuple[int, ...], device: torch.device) -> Documents:
    by_length = [(right - left, left, i) for i, (left, right) in enumerate(itertools.pairwise(cuts)) if left < right]
    by_length.sort(key=lambda document: -document[0])
    length, begin, row = (torch.tensor(column, device=device) for column in zip(*by_length, strict=True))
    counts: list[int] = []
    for n in range(len(by_length), 0, -1):  # from the shortest
        counts += [n] * (by_length[n - 1][0] - len(counts))
    return Documents(row, begin, length, tuple(counts))


class Slabs:
    """Tensors (B, T, H, ...) as rows (B * T * H, ...), ordered by step, then head, then sequence."""

    def __init__(self, B: int, T: int, H: int, cuts: tuple[int, ...] | None, device: torch.device):
        self.B, self.T, self.H, self.cuts = B, T, H, cuts
        if cuts is not None:
            self.documents = documents(B, T, cuts, device)
            self.place, self.end, self.previous = _places(cuts, H, device)

    def lay(self, x: Tensor) -> Tensor:
        """(B, T, H, ...) -> (rows, ...), always a copy."""
        if self.cuts is None:
            return x.permute(1, 2, 0, *range(3, x.ndim)).clone(memory_format=torch.contiguous_format).flatten(0, 2)
        rows = x.new_empty(x.shape[1] * self.H, *x.shape[3:])
        rows[self.place.flatten()] = x[0].flatten(0, 1)
        return rows

    def tokens(self, rows: Tensor) -> Tensor:
        """(rows, ...) -> (B, T, H, ...)."""
        if self.cuts is None:
            tokens: Tensor = rows.unflatten(0, (self.T, self.H, self.B)).permute(2, 0, 1, *range(3, rows.ndim + 2))
            return tokens
        return rows[self.place].unsqueeze(0)

    def heads(self, rows: Tensor) -> Tensor:
        """(rows, W) -> (H, B * T, W), in one order for all."""
        return self.tokens(rows).flatten(0, 1).transpose(0, 1)

    def steps(self, rows: Tensor) -> Sequence[Tensor]:
        """Views (H, n, ...) of the rows of each step."""
        if self.cuts is None:
            steps: Sequence[Tensor] = rows.unflatten(0, (self.T, self.H, self.B)).unbind(0)
            return steps
        counts = self.documents.counts
        parts = rows.split([self.H * n for n in counts])
        return [part.unflatten(0, (self.H, n)) for part, n in zip(parts, counts, strict=True)]

    def enter(self, state: Tensor) -> Tensor:
        """(B or n, S, H, D) -> (S, H, n, D), of sequences that have tokens; always a copy."""
        if self.cuts is not None:
            state = state[self.documents.row]
        return state.permute(1, 2, 0, 3).clone(memory_format=torch.contiguous_format)

    def leave(self, state: Tensor, others: Tensor) -> Tensor:
        """(S, H, n, D) -> (B or n, S, H, D), always a copy; documents without tokens have those of `others`."""
        state = state.permute(2, 0, 1, 3)
        if self.cuts is None:
            return state.clone(memory_format=torch.contiguous_format)
        return others.index_copy(0, self.documents.row, state)

    def last(self, rows: Tensor) -> Tensor:
        """(rows, D) -> (H, n, D): of the last step of each sequence."""
        return rows.unflatten(0, (self.T, self.H, self.B))[-1] if self.cuts is None else rows[self.end]

    def add_to_last(self, rows: Tensor, x: Tensor) -> None:
        """Add (H, n, D) to the rows of each sequence's last step, in place."""
        if self.cuts is None:
            self.last(rows).add_(x)
        else:
            rows.index_add_(0, self.end.flatten(), x.flatten(0, 1))

    def before(self, rows: Tensor, first: Tensor) -> Tensor:
        """(rows, D) of the step before each; first (H, n, D) is before the first step."""
        known = torch.cat([first.flatten(0, 1), rows])
        return known[: len(rows)] if self.cuts is None else known[self.previous]

    def carried(self, open_: Tensor, last: Tensor) -> Tensor | None:
        """What each step receives of last (H, n, D) where steps let through (open_, bool (rows, D)) or stop; None for
        nothing."""
        if not last.any():
            return None
        filled = last.new_empty(open_.shape)
        carry = last.clone()
        for filled_t, open_t in zip(reversed(self.steps(filled)), reversed(self.steps(open_)), strict=True):
            now = carry[:, : filled_t.shape[1]]
            filled_t.copy_(now)
            now.mul_(open_t)
        return filled


@cached_tensors()
def _places(cuts: tuple[int, ...], H: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where (token, head) lies, (N, H); where the last steps lie, (H, n); for each row the row before it in
    [first (H * n), rows], (N * H,)."""
    order = documents(1, cuts[-1], cuts, device)
    counts = torch.tensor(order.counts, device=device)
    start = H * (counts.cumsum(0) - counts)  # of each slab
    n, heads = len(order.row), torch.arange(H, device=device)
    rank = torch.repeat_interleave(torch.arange(n, device=device), order.length)  # of each token, document by document
    first = torch.repeat_interleave(order.length.cumsum(0) - order.length, order.length)
    step = torch.arange(cuts[-1], device=device) - first
    token = torch.repeat_interleave(order.begin, order.length) + step

    def row(step: Tensor, rank: Tensor) -> Tensor:
        return start[step].unsqueeze(-1) + heads * counts[step].unsqueeze(-1) + rank.unsqueeze(-1)

    here = row(step, rank)  # (N, H)
    earlier = torch.where(
        (step == 0).unsqueeze(-1), heads * n + rank.unsqueeze(-1), H * n + row((step - 1).clamp_min(0), rank)
    )
    place, previous = torch.empty_like(here), torch.empty_like(here).flatten()
    place[token] = here
    previous[here.flatten()] = earlier.flatten()
    end = row(order.length - 1, torch.arange(n, device=device)).T
    return place, end.contiguous(), previous
