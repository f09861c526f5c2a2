"""The masks that people name (causal, windows, lengths, documents) as what the kernels read: a Visible and its runs."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.ops.attention.attention.tiles import Runs, band_runs, runs
from zoo.ops.attention.attention.visible import ALL, Visible
from zoo.ops.core.cached import cached_tensors

__all__ = ["Mask", "named_mask"]


@dataclass(frozen=True)
class Mask:
    """A Visible, and how its runs and pairs are known.

    start: (1 or B,), of a band the first key that exists in each row; its runs then come from arithmetic.
    band: (left, right) of that.
    count: the visible pairs, where they are known without reading a device.
    """

    visible: Visible
    start: Tensor | None = None
    band: tuple[int | None, int | None] = (None, None)
    count: int | None = None

    def runs(self, queries: int, keys: int, *, of_keys: bool = False) -> Runs:
        """The runs in blocks of so many queries and keys, as `tiles.runs` gives them."""
        if self.start is None:
            return runs(self.visible, queries, keys, of_keys=of_keys)
        T, S = self.visible.label.shape[1], self.visible.first.shape[1]
        name = "band", queries, keys, of_keys
        if name not in self.visible.kept:
            with torch.inference_mode(False):
                self.visible.kept[name] = band_runs(T, S, *self.band, self.start, queries, keys, of_keys=of_keys)
        kept: Runs = self.visible.kept[name]
        return kept

    def pairs(self) -> int:
        """Pairs of a query and a key that see each other, all rows; keys that key_lengths take away included."""
        return self.visible.pairs() if self.count is None else self.count


def named_mask(
    B: int, T: int, S: int, causal: bool, window: int | None, key_lengths: Tensor | None,
    cuts: tuple[int, ...] | None, keys: tuple[int, ...] | None, device: torch.device,
) -> Mask:  # fmt: skip
    """The mask of these arguments of zoo.ops.attention; `cuts` and `keys` are the boundaries of packed documents."""
    if cuts is not None and keys is not None:
        return _documents(cuts, keys, causal, window, device)
    left, right = None if window is None else window - 1, 0 if causal else None if window is None else window - 1
    band = _band(T, S, left, right, device)
    count = B * _pairs(T, S, causal, window)
    if key_lengths is None:
        return Mask(band, _from_the_first(device), (left, right), count)
    start = S - key_lengths.clamp(0, S)
    there = torch.arange(S, device=device) >= start[:, None]
    first, end = band.first.expand(B, S), band.end.where(there, band.first)  # nobody sees what is not there
    return Mask(Visible(band.label.expand(B, T), first, end), start, (left, right), count)


@cached_tensors()
def _band(T: int, S: int, left: int | None, right: int | None, device: torch.device) -> Visible:
    return _narrow(Visible.band(T, left, right, S=S, device=device))


@cached_tensors()
def _from_the_first(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=device)


@cached_tensors()
def _documents(
    cuts: tuple[int, ...], keys: tuple[int, ...], causal: bool, window: int | None, device: torch.device
) -> Mask:
    visible = Visible.documents(cuts, cu_seqlens_k=keys, causal=causal, window=window, device=device)
    each = zip(itertools.pairwise(cuts), itertools.pairwise(keys), strict=True)
    count = sum(_pairs(q1 - q0, k1 - k0, causal, window) for (q0, q1), (k0, k1) in each)
    return Mask(_narrow(visible), count=count)


def _narrow(visible: Visible) -> Visible:
    """In int32, which kernels read faster."""
    return Visible(*(x.clamp(-ALL, ALL).int() for x in (visible.label, visible.first, visible.end)))


def _pairs(T: int, S: int, causal: bool, window: int | None) -> int:
    """How many of T queries and S keys see each other."""

    def up_to(reach: int) -> int:
        """The sum over queries of the keys before position + reach."""
        return _sum_of_clipped(S - 1 + reach, S) - _sum_of_clipped(S - T - 1 + reach, S)

    total = up_to(1) if causal else T * S if window is None else up_to(window)
    return total if window is None else total - up_to(1 - window)


def _sum_of_clipped(n: int, top: int) -> int:
    """The sum of min(max(x, 0), top) over integers x <= n."""
    below = min(max(n, 0), top)
    return below * (below + 1) // 2 + max(n - top, 0) * top
