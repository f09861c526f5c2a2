"""Which blocks of queries and keys hold a visible pair, from the bounds of labels and intervals: no T x S mask is read.

A block of queries has a least and a largest label, a block of keys the extremes of its intervals. Some pair of two
blocks may be visible where the intervals reach the labels; all pairs are where every interval holds every label. Both
are judged by bounds, so a block may be looked at in vain, and is never left out. Neighbours of one kind are a run.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.attention.attention.visible import Visible

__all__ = ["Runs", "band_runs", "runs"]

AT_ONCE = 2**20  # pairs of blocks that are judged in one go: bounds the memory


class Runs(NamedTuple):
    """For each block of queries the runs of keys that it sees, or for each block of keys the queries that see it.

    offsets: (2 rows blocks + 1,) int32. With c = 2 (row blocks + block), the runs c ... are spans[offsets[c] :
        offsets[c + 1]] where pairs may be hidden, and spans[offsets[c + 1] : offsets[c + 2]] where none is.
    spans: (runs, 2) int32, the first and last + 1 of each. All begin at a block, and those without hidden pairs end at
        one.
    """

    offsets: Tensor
    spans: Tensor


class _Blocks(NamedTuple):
    """Extremes over blocks: of labels (1, rows, blocks), or of one end of each interval (intervals, rows, blocks)."""

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, x: Tensor, size: int) -> "_Blocks":
        """The least and the largest of every stretch of `size` along the last dimension, the last one repeated."""
        rest = -x.shape[-1] % size
        if rest and x.shape[-1]:
            x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], rest)], dim=-1)
        cut = x.unflatten(-1, (x.shape[-1] // size, size))
        return cls(cut.amin(-1), cut.amax(-1))


def runs(visible: Visible, queries: int, keys: int, *, of_keys: bool = False, together: bool = False) -> Runs:
    """Runs of blocks of `keys` keys for each block of `queries` queries, or with `of_keys` the other way round.

    They are made once for each Visible. On CUDA that reads the device.

    Args:
        visible: the mask.
        queries, keys: sizes of the blocks.
        of_keys: a list for each block of keys.
        together: one table for all rows: a block is seen if some row sees it, and without hidden pairs if it is so in
            all rows.
    """
    name = queries, keys, of_keys, together
    if name not in visible.kept:
        with torch.inference_mode(False), torch.no_grad():
            visible.kept[name] = _runs(visible, queries, keys, of_keys, together)
    kept: Runs = visible.kept[name]
    return kept


def _runs(visible: Visible, queries: int, keys: int, of_keys: bool, together: bool) -> Runs:
    T, S = visible.label.shape[1], visible.first.shape[1]
    size, length = (queries, T) if of_keys else (keys, S)
    blocks = -(-(S if of_keys else T) // (keys if of_keys else queries))
    rows = 1 if together else visible.label.shape[0]
    if visible.label.is_meta:  # shapes alone; how many runs there are, nobody knows
        sizes = (2 * rows * blocks + 1,), (0, 2)
        return Runs(*(visible.label.new_empty(size, dtype=torch.int32) for size in sizes))
    lines, begins, ends = [], [], []
    for at, some, every in _judged(visible, queries, keys, of_keys):
        if together:
            some, every = some.any(0, keepdim=True), every.all(0, keepdim=True)
        if length % size:
            every[..., -1] = False  # the last block is no whole one
        for kind, flags in enumerate((some & ~every, every)):
            edge = F.pad(flags.to(torch.int8), (1, 1)).diff(dim=-1)
            row, block, begin = (edge == 1).nonzero().unbind(1)
            lines.append(2 * (row * blocks + block + at) + kind)
            begins.append(begin)
            ends.append((edge == -1).nonzero()[:, 2])
    nothing = visible.label.new_zeros(0, dtype=torch.int64)
    line, order = torch.cat([*lines, nothing]).sort(stable=True)
    offsets = F.pad(torch.bincount(line, minlength=2 * rows * blocks).cumsum(0), (1, 0))
    spans = torch.stack([torch.cat([*x, nothing])[order] * size for x in (begins, ends)], dim=1)
    return Runs(offsets.int(), spans.clamp(max=length).int())


def _judged(visible: Visible, queries: int, keys: int, of_keys: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
    """From block `at` on, (rows, blocks, blocks of the others): may some pair be visible, and are all?"""
    label = _Blocks.of(visible.label[None], queries)
    first, end = (torch.stack(side) for side in zip(*visible.intervals, strict=True))
    nobody = first >= end
    least, most = torch.iinfo(first.dtype).min, torch.iinfo(first.dtype).max
    reach_first, reach_end = first.masked_fill(nobody, most), end.masked_fill(nobody, least)
    near = _Blocks(_Blocks.of(reach_first, keys).low, _Blocks.of(reach_end, keys).high)  # what some key reaches
    full = _Blocks(_Blocks.of(end, keys).low, _Blocks.of(first, keys).high)  # what all keys reach
    n, m = label.low.shape[-1], near.low.shape[-1]
    outer, inner = (m, n) if of_keys else (n, m)
    step = max(1, AT_ONCE // max(1, visible.label.shape[0] * inner))
    for at in range(0, outer if inner else 0, step):
        here = slice(at, at + step)
        if of_keys:
            (low, high), (near_first, near_end), (full_end, full_first) = (
                (x[..., None, :] for x in label), (x[..., here, None] for x in near), (x[..., here, None] for x in full)
            )  # fmt: skip
        else:
            (low, high), (near_first, near_end), (full_end, full_first) = (
                (x[..., here, None] for x in label), (x[..., None, :] for x in near), (x[..., None, :] for x in full)
            )  # fmt: skip
        some = ((near_first <= high) & (low < near_end)).any(0)
        yield at, some, ((full_first <= low) & (high < full_end)).any(0) & some


def band_runs(
    T: int, S: int, left: int | None, right: int | None, start: Tensor, queries: int, keys: int, *,
    of_keys: bool = False,
) -> Runs:  # fmt: skip
    """The runs of `Visible.band(T, left, right, S=S)` where row b has only the keys start[b] ... S - 1.

    They come from arithmetic alone, so that nothing is read from a device: what a block sees is one stretch.

    Args:
        T, S, left, right: as of `Visible.band`.
        start: (rows,) integers in [0, S].
        queries, keys, of_keys: as of `runs`.
    """
    begin = start.long()[:, None]  # (rows, 1)
    offset, far = S - T, S + T
    if of_keys:
        first, size, length = torch.arange(0, S, keys, device=start.device), queries, T
        last = (first + keys - 1).clamp(max=S - 1)
        exists = torch.maximum(first, begin)  # the first key of the block that is there
        lo, stop = exists - (far if right is None else right), last + 1 + (far if left is None else left)
        all_lo, all_stop = last - (far if right is None else right), exists + 1 + (far if left is None else left)
        stop, all_stop = torch.where(exists > last, lo, stop), torch.where(exists > first, all_lo, all_stop)
        lo, stop, all_lo, all_stop = (x - offset for x in (lo, stop, all_lo.expand_as(lo), all_stop))
    else:
        first, size, length = torch.arange(0, T, queries, device=start.device) + offset, keys, S
        last = (first + queries - 1).clamp(max=S - 1)
        lo, stop = first - (far if left is None else left), last + 1 + (far if right is None else right)
        all_lo, all_stop = last - (far if left is None else left), first + 1 + (far if right is None else right)
        lo, all_lo = torch.maximum(lo, begin), torch.maximum(all_lo, begin)
        stop, all_stop = stop.expand_as(lo), all_stop.expand_as(lo)
    lo, stop, all_lo, all_stop = (x.clamp(0, length) for x in (lo, stop, all_lo, all_stop))
    lo, stop = lo // size * size, torch.maximum(stop, lo // size * size)
    stop = torch.where(stop > lo, stop, lo)
    inner, outer = -(-all_lo // size) * size, all_stop // size * size
    inner = torch.where(outer > inner, inner, stop)
    outer = torch.maximum(outer, inner)
    spans = torch.stack([lo, inner, outer, stop, inner, outer], dim=-1).view(-1, 2)  # two with hidden pairs, then one
    offsets = torch.arange(lo.numel() + 1, device=start.device, dtype=torch.int32) * 3
    both = torch.stack([offsets[:-1], offsets[:-1] + 2], dim=1).flatten()
    return Runs(torch.cat([both, offsets[-1:]]), spans.int())
