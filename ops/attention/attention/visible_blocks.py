"""Attention by blocks under a Visible: blocks of keys that no query of a block sees are never touched."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.attention.attention.blockwise import BLOCK_KEYS, BLOCK_QUERIES, Blocks, attend, gradients
from zoo.ops.attention.attention.tiles import runs
from zoo.ops.attention.attention.visible import Visible
from zoo.ops.core.autograd import apply
from zoo.ops.core.differentiation import first_order

__all__ = ["VisibleBlocks", "attention_visible"]

TILE = 64  # keys: how finely it is known what a block of queries sees


def attention_visible(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float) -> tuple[Tensor, Tensor]:
    """(B, T, H, K), (B, S, Hk, K), (B, S, Hk, V) -> o (B, T, H, V) and its log-sum-exp (B, T, H)."""
    o, lse, _, _ = apply(_VisibleBlockwise, q, k, v, visible, scale)
    return o, lse


class _Span(NamedTuple):
    """Keys begin ... end - 1 that a block of queries sees; in `edges`, (begin, end) each, pairs may be hidden."""

    begin: int
    end: int
    edges: list[tuple[int, int]]


def _spans(visible: Visible) -> list[list[_Span]]:
    """For each block of queries the stretches of keys that some of them, in some row, may see."""
    if "spans" not in visible.kept:
        table = runs(visible, BLOCK_QUERIES, TILE, together=True)
        offsets, ends = table.offsets.tolist(), [(begin, end) for begin, end in table.spans.tolist()]
        visible.kept["spans"] = [
            _joined(ends[offsets[c] : offsets[c + 1]], ends[offsets[c + 1] : offsets[c + 2]])
            for c in range(0, len(offsets) - 1, 2)
        ]
    kept: list[list[_Span]] = visible.kept["spans"]
    return kept


def _joined(masked: list[tuple[int, int]], full: list[tuple[int, int]]) -> list[_Span]:
    """Runs that touch become one span, of at most BLOCK_KEYS keys where it can be cut between runs."""
    joined: list[_Span] = []
    for begin, end, hides in sorted([(*run, True) for run in masked] + [(*run, False) for run in full]):
        edges = [(begin, end)] if hides else []
        if joined and joined[-1].end == begin and end - joined[-1].begin <= BLOCK_KEYS:
            joined[-1] = _Span(joined[-1].begin, end, joined[-1].edges + edges)
        else:
            joined.append(_Span(begin, end, edges))
    return joined


class VisibleBlocks(Blocks):
    """The scores of one call under a Visible."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float):
        super().__init__(q, k, v, None, False, None, scale)
        self.visible, self.spans = visible, _spans(visible)

    def keys(self, left: int, right: int) -> Iterator[tuple[int, int]]:
        """Stretches of keys of which some query of left ... right - 1 sees one."""
        for span in self.spans[left // BLOCK_QUERIES]:
            for begin in range(span.begin, span.end, BLOCK_KEYS):
                yield begin, min(begin + BLOCK_KEYS, span.end)

    def scores(self, q: Tensor, left: int, right: int, begin: int, end: int) -> Tensor:
        """(B, Hk, G * queries, keys), -inf where a query may not see a key; q already scaled."""
        s = q @ self.k[:, :, begin:end].mT
        view = s.unflatten(2, (-1, right - left))
        label = self.visible.label[:, left:right, None]
        for span in self.spans[left // BLOCK_QUERIES]:
            for edge in span.edges:
                i, j = max(begin, edge[0]), min(end, edge[1])
                if i < j:
                    hidden = _hidden(label, self.visible, i, j)
                    view[..., i - begin : j - begin].masked_fill_(hidden[:, None, None], float("-inf"))
        return s


def _hidden(label: Tensor, visible: Visible, begin: int, end: int) -> Tensor:
    """(B, queries, keys) bool: the query may not see the key."""
    (first, stop), *others = visible.intervals
    hidden = (label < first[:, None, begin:end]) | (label >= stop[:, None, begin:end])
    for first, stop in others:
        hidden &= (label < first[:, None, begin:end]) | (label >= stop[:, None, begin:end])
    return hidden


class _VisibleBlockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        o, m, log_l = attend(VisibleBlocks(q, k, v, visible, scale), q.dtype)
        lse = (m + log_l).masked_fill_(m == float("inf"), float("-inf"))
        ctx.save_for_backward(q, k, v, o, m, log_l)
        ctx.visible, ctx.scale = visible, scale
        ctx.mark_non_differentiable(m, log_l)
        return o, lse, m, log_l

    @staticmethod
    @first_order("attention")
    def backward(ctx: Any, do: Tensor, dlse: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, m, log_l = ctx.saved_tensors
        at = VisibleBlocks(q, k, v, ctx.visible, ctx.scale)
        D = (do.to(at.dtype) * o.to(at.dtype)).sum(-1) - dlse.to(at.dtype)  # (B, T, H)
        D = D.masked_fill(m == float("inf"), 0.0)
        dq, dk, dv = gradients(at, do, D, m, log_l, q.dtype)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None
