"""Attention by blocks under a Visible: blocks of keys that no query of a block sees are never touched."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zoo.ops.attention.attention.blockwise import BLOCK_KEYS, BLOCK_QUERIES, Blocks, attend, gradients
from zoo.ops.attention.attention.visible import Visible
from zoo.ops.core.autograd import apply
from zoo.ops.core.differentiation import first_order

__all__ = ["attention_visible"]

TILE = 64  # keys: how finely it is known what a block of queries sees


def attention_visible(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float) -> tuple[Tensor, Tensor]:
    """(B, T, H, K), (B, S, Hk, K), (B, S, Hk, V) -> o (B, T, H, V) and its log-sum-exp (B, T, H)."""
    o, lse, _, _ = apply(_VisibleBlockwise, q, k, v, visible, scale)
    return o, lse


class _VisibleBlocks(Blocks):
    """The scores of one call; a table of T / BLOCK_QUERIES x S / TILE bools says where there is something to see."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float):
        super().__init__(q, k, v, None, False, None, scale)
        self.visible = visible
        some, every = _tables(visible)
        self.runs = [_runs(row, self.S) for row in some.tolist()]
        self.every: list[list[bool]] = every.tolist()

    def keys(self, left: int, right: int) -> Iterator[tuple[int, int]]:
        """Runs of tiles of which some query of left ... right - 1 sees a key."""
        for first, last in self.runs[left // BLOCK_QUERIES]:
            for begin in range(first, last, BLOCK_KEYS):
                yield begin, min(begin + BLOCK_KEYS, last)

    def scores(self, q: Tensor, left: int, right: int, begin: int, end: int) -> Tensor:
        """(B, Hk, G * queries, keys), -inf where a query may not see a key; q already scaled."""
        s = q @ self.k[:, :, begin:end].mT
        if all(self.every[left // BLOCK_QUERIES][begin // TILE : -(-end // TILE)]):
            return s
        label = self.visible.label[:, left:right, None]
        hidden: Tensor | None = None
        for first, stop in self.visible.intervals:
            outside = (label < first[:, None, begin:end]) | (label >= stop[:, None, begin:end])
            hidden = outside if hidden is None else hidden & outside
        assert hidden is not None
        s.unflatten(2, (-1, right - left)).masked_fill_(hidden[:, None, None], float("-inf"))
        return s


def _tables(visible: Visible) -> tuple[Tensor, Tensor]:
    """(query blocks, key tiles) bool twice: some pair may see each other in some row, and all pairs do in all rows.

    The first is right where it is False, the second where it is True: both look at bounds alone.
    """
    low, high = _least(visible.label, BLOCK_QUERIES), _largest(visible.label, BLOCK_QUERIES)  # (B, blocks)
    some = every = None
    for first, end in visible.intervals:
        nobody = first >= end
        first_seen = first.masked_fill(nobody, torch.iinfo(first.dtype).max)
        end_seen = end.masked_fill(nobody, torch.iinfo(end.dtype).min)
        near = _least(first_seen, TILE)[:, None] <= high[..., None]
        near &= low[..., None] < _largest(end_seen, TILE)[:, None]
        full = _largest(first, TILE)[:, None] <= low[..., None]
        full &= high[..., None] < _least(end, TILE)[:, None]
        some = near if some is None else some | near
        every = full if every is None else every | full
    assert some is not None
    assert every is not None
    return some.any(0), every.all(0)


def _least(x: Tensor, size: int) -> Tensor:
    """(B, n) -> (B, ceil(n / size)): the least of every stretch of `size`."""
    return _stretches(x, size).amin(2)


def _largest(x: Tensor, size: int) -> Tensor:
    """As `_least`, the largest; not by a change of sign, since the least integer has none."""
    return _stretches(x, size).amax(2)


def _stretches(x: Tensor, size: int) -> Tensor:
    """(B, n) -> (B, ceil(n / size), size), the last entry repeated."""
    rest = -x.shape[1] % size
    if rest and x.shape[1]:
        x = torch.cat([x, x[:, -1:].expand(-1, rest)], dim=1)
    cut: Tensor = x.unflatten(1, (x.shape[1] // size, size))
    return cut


def _runs(row: list[bool], S: int) -> list[tuple[int, int]]:
    """Stretches of keys whose tiles are True, neighbours as one."""
    runs: list[tuple[int, int]] = []
    for tile, there in enumerate(row):
        if not there:
            continue
        begin, end = tile * TILE, min((tile + 1) * TILE, S)
        if runs and runs[-1][1] == begin:
            runs[-1] = runs[-1][0], end
        else:
            runs.append((begin, end))
    return runs


class _VisibleBlockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        o, m, log_l = attend(_VisibleBlocks(q, k, v, visible, scale), q.dtype)
        lse = (m + log_l).masked_fill_(m == float("inf"), float("-inf"))
        ctx.save_for_backward(q, k, v, o, m, log_l)
        ctx.visible, ctx.scale = visible, scale
        ctx.mark_non_differentiable(m, log_l)
        return o, lse, m, log_l

    @staticmethod
    @first_order("attention")
    def backward(ctx: Any, do: Tensor, dlse: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, m, log_l = ctx.saved_tensors
        at = _VisibleBlocks(q, k, v, ctx.visible, ctx.scale)
        D = (do.to(at.dtype) * o.to(at.dtype)).sum(-1) - dlse.to(at.dtype)  # (B, T, H)
        D = D.masked_fill(m == float("inf"), 0.0)
        dq, dk, dv = gradients(at, do, D, m, log_l, q.dtype)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None
