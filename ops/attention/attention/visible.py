"""Which query sees which key, as an interval of labels for each key: every mask of attention in O(T + S) memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Visible"]

ALL = 2**31 - 1  # an end behind all labels


@dataclass(frozen=True, eq=False)
class Visible:
    """Key j is seen by query i of the same row when first[j] <= label[i] < end[j].

    A second interval for each key is optional: then a query sees the keys of either. Masks of T x S are never made of
    it, and blocks without a visible pair are skipped.

    Args:
        label: of the queries, (B, T) int32 or int64. B may be 1 for all rows of a batch alike.
        first, end: of the keys, (B, S), of the same dtype; a key with first >= end is seen by nobody.
        first2, end2: the second interval, or None.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or half of the second interval is missing.
    """

    label: Tensor
    first: Tensor
    end: Tensor
    first2: Tensor | None = None
    end2: Tensor | None = None
    kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)  # tables made of it, for later calls

    def __post_init__(self) -> None:
        if (self.first2 is None) != (self.end2 is None):
            raise ValueError("Visible: the second interval needs both first2 and end2; got one of them")
        keys = [x for x in (self.first, self.end, self.first2, self.end2) if x is not None]
        for x in (self.label, *keys):
            if x.ndim != 2 or x.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"Visible: all parts are (B, T or S) int32 or int64; got {tuple(x.shape)} {x.dtype}")
            if (x.shape[0], x.dtype, x.device) != (self.label.shape[0], self.label.dtype, self.label.device):
                raise ValueError(
                    f"Visible: all parts share rows, dtype and device; got {tuple(x.shape)} {x.dtype} on {x.device} "
                    f"beside a label {tuple(self.label.shape)} {self.label.dtype} on {self.label.device}"
                )
        if any(x.shape != self.first.shape for x in keys):
            raise ValueError(f"Visible: all intervals are of the same keys; got {[tuple(x.shape) for x in keys]}")

    # -- masks that people name -------------------------------------------------------------------------------------

    @classmethod
    def band(
        cls, T: int, left: int | None, right: int | None, *, S: int | None = None, device: torch.device | None = None
    ) -> "Visible":
        """Query i stands at position p = S - T + i and sees the keys p - left ... p + right.

        Args:
            T, S: queries and keys; S is T when omitted.
            left, right: how far it sees before and behind itself; None for all.
        """
        S = T if S is None else S
        key = torch.arange(S, device=device)
        first = torch.full_like(key, -ALL) if right is None else key - right
        end = torch.full_like(key, ALL) if left is None else key + left + 1
        return cls((torch.arange(T, device=device) + S - T)[None], first[None], end[None])

    @classmethod
    def causal(
        cls, T: int, *, S: int | None = None, window: int | None = None, device: torch.device | None = None
    ) -> "Visible":
        """Keys at or before the query's position; of these the last `window`, the own included."""
        return cls.band(T, None if window is None else window - 1, 0, S=S, device=device)

    @classmethod
    def documents(
        cls, cu_seqlens: Sequence[int], *, cu_seqlens_k: Sequence[int] | None = None, causal: bool = True,
        window: int | None = None, device: torch.device | None = None,
    ) -> "Visible":  # fmt: skip
        """Packed documents with these boundaries (n + 1,), which do not see each other.

        Args:
            cu_seqlens: 0, the ends of all documents but the last, and T.
            cu_seqlens_k: the same of the keys where they differ, as behind a cache: queries are then the last of the
                keys of their document.
            causal: see only keys at or before the query; both sides otherwise.
            window: of these only keys less than `window` away.
        """
        queries, keys = (torch.tensor(cuts, device=device) for cuts in (cu_seqlens, cu_seqlens_k or cu_seqlens))
        ends = torch.maximum(queries.diff(), keys.diff()).cumsum(0)  # labels of a document end here

        def places(cuts: Tensor, total: int) -> tuple[Tensor, Tensor]:
            """The document of each token, and its label."""
            document = torch.arange(len(ends), device=device).repeat_interleave(cuts.diff(), output_size=total)
            return document, torch.arange(total, device=device) + (ends - cuts[1:])[document]

        _, label = places(queries, cu_seqlens[-1])
        document, key = places(keys, (cu_seqlens_k or cu_seqlens)[-1])
        first, end = (key if causal else F.pad(ends, (1, 0))[document]), ends[document]
        if window is not None:
            first, end = torch.maximum(first, key - window + 1), torch.minimum(end, key + window)
        return cls(label[None], first[None], end[None])

    @classmethod
    def chunks(cls, T: int, size: int, *, device: torch.device | None = None) -> "Visible":
        """Causal inside chunks of `size` tokens, which do not see each other."""
        key = torch.arange(T, device=device)
        return cls(key[None], key[None], ((key // size + 1) * size)[None])

    @classmethod
    def block_diffusion(
        cls, T: int, block: int, *, cu_seqlens: Sequence[int] | None = None, device: torch.device | None = None
    ) -> "Visible":
        """The two streams of training by block diffusion, [noisy | clean]: T tokens each, 2 T queries and keys.

        A noisy token sees the noisy ones of its own block and the clean ones of all blocks before. A clean token sees
        the clean ones of its own block and of those before. These are T (T + block) pairs where block divides T.

        Args:
            T: tokens of one stream.
            block: tokens that are denoised together; the last block of a document may be shorter.
            cu_seqlens: boundaries (n + 1,) of packed documents in one stream, from 0 to T. They do not see each other,
                and blocks are counted from the beginning of each.

        Raises:
            ValueError: cu_seqlens do not go from 0 to T.

        Source: arXiv 2503.09573.
        """
        bounds = [0, T] if cu_seqlens is None else list(cu_seqlens)
        if bounds[0] != 0 or bounds[-1] != T or sorted(bounds) != bounds:
            raise ValueError(
                f"Visible.block_diffusion: cu_seqlens must rise from 0 to T = {T} of one stream; got {bounds}"
            )
        cuts = torch.tensor(bounds, device=device)
        sizes = cuts.diff()
        stops = ((sizes + block - 1) // block).cumsum(0)  # a document's blocks end here
        document = torch.arange(len(sizes), device=device).repeat_interleave(sizes, output_size=T)
        at = F.pad(stops, (1, 0))[document] + (torch.arange(T, device=device) - cuts[document]) // block
        label = torch.cat([2 * at, 2 * at + 1])
        end = torch.cat([2 * at + 1, 2 * stops[document]])
        return cls(label[None], label[None], end[None])

    @classmethod
    def tree(
        cls, parents: Sequence[int], *, past: int | Sequence[int] = 0, slots: int | None = None,
        device: torch.device | None = None,
    ) -> "Visible":  # fmt: skip
        """Nodes of trees of tokens behind a text: each sees the text, its ancestors and itself.

        Args:
            parents: of every node, an earlier node's index, or -1 for one that follows the text.
            past: tokens of the text, whose keys come first; a number for each row where the rows' texts differ. The
                key of node i is in slot past + i.
            slots: S, the slots of the cache. Omitted, as many as the longest text and the nodes need. Nobody sees the
                slots behind a row's nodes.

        Raises:
            ValueError: a parent is no earlier node, or past and the nodes have no room.
        """
        n = len(parents)
        texts = [past] if isinstance(past, int) else list(past)
        slots = max(texts, default=0) + n if slots is None else slots
        if any(text < 0 or text + n > slots for text in texts):
            raise ValueError(
                f"Visible.tree: past must be at least 0 and leave {n} of {slots} slots to the nodes; got {past}"
            )
        places, sizes = _preorder(parents)
        first, size = (torch.tensor([*numbers, 0], device=device, dtype=torch.int64) for numbers in (places, sizes))
        node = torch.arange(slots, device=device) - torch.tensor(texts, device=device, dtype=torch.int64)[:, None]
        at = node.clamp(0, n)  # entry n: the slots behind the nodes
        text = node < 0
        begin = first[at].masked_fill(text, 0)
        end = (first + size)[at].masked_fill(text, ALL)
        return cls(first[:n].repeat(len(texts), 1), begin, end)

    # -- what is known of it ----------------------------------------------------------------------------------------

    @property
    def intervals(self) -> list[tuple[Tensor, Tensor]]:
        """(first, end) of every interval, (B, S) each."""
        second = [] if self.first2 is None or self.end2 is None else [(self.first2, self.end2)]
        return [(self.first, self.end), *second]

    def stacked(self) -> Tensor:
        """(B, 2, S), first and end of every key; (B, 4, S) with two intervals. Made once."""
        if "stacked" not in self.kept:
            with torch.inference_mode(False):
                self.kept["stacked"] = torch.stack([x for each in self.intervals for x in each], dim=1)
        made: Tensor = self.kept["stacked"]
        return made

    def pairs(self) -> int:
        """How many queries see a key, over all rows; O((T + S) log T), reads the device at its first call."""
        if "pairs" not in self.kept:
            self.kept["pairs"] = self._pairs()
        counted: int = self.kept["pairs"]
        return counted

    def _pairs(self) -> int:
        if self.label.is_meta:  # nobody knows: as many as can be
            return self.label.numel() * self.first.shape[1]
        labels = self.label.sort(dim=1).values

        def count(first: Tensor, end: Tensor) -> Tensor:
            below = (torch.searchsorted(labels, x.contiguous()) for x in (first, torch.maximum(first, end)))
            start, stop = below
            return (stop - start).sum()

        total = sum((count(*each) for each in self.intervals), start=labels.new_zeros(()))
        if self.first2 is not None and self.end2 is not None:  # what both intervals have counts once
            total = total - count(torch.maximum(self.first, self.first2), torch.minimum(self.end, self.end2))
        return int(total)

    def dense(self) -> Tensor:
        """(B, T, S) bool, for a look at it, for tests, and for the definition of attention: T x S numbers."""
        label = self.label[:, :, None]
        seen = [(first[:, None] <= label) & (label < end[:, None]) for first, end in self.intervals]
        return seen[0] if len(seen) == 1 else seen[0] | seen[1]


def _preorder(parents: Sequence[int]) -> tuple[list[int], list[int]]:
    """The place of each node in a walk that goes down before it goes on, and the nodes of its subtree."""
    n = len(parents)
    places, sizes = [0] * n, [1] * n
    for node in reversed(range(n)):
        if not -1 <= parents[node] < node:
            raise ValueError(f"Visible.tree: a parent must be an earlier node or -1; node {node} has {parents[node]}")
        if parents[node] >= 0:
            sizes[parents[node]] += sizes[node]
    free = {-1: 0}  # the first place in preorder that no child of a node has taken
    for node in range(n):
        places[node] = free[parents[node]]
        free[parents[node]] += sizes[node]
        free[node] = places[node] + 1
    return places, sizes
