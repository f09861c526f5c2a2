"""Heads are shared out among neighbours, and groups of neighbours form a ring (Ulysses, and with a ring USP).

All-to-alls turn a rank's own tokens of all heads into its neighbours' tokens of its heads, and back. A rank gets the
key heads that its query heads read: where these are fewer than ranks, several ranks get the same one, and its gradients
add up at home. What came forward is kept for the backward; after a recomputation, which sends nothing, it is fetched
again.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.ops.attention.attention.parallel.crossing import Crossing
from zoo.ops.attention.attention.parallel.ring import Ring
from zoo.ops.attention.attention.parallel.view import View
from zoo.ops.core.dispatch import state_dtype
from zoo.ops.shard import exchange, stretch, token_indices
from zoo.ops.shard.sequence_shard import SequenceShard

Spans = Sequence[tuple[int, int]]  # of heads, [left, right) for each neighbour


class Heads(Crossing):
    """The view has one seat for each group of neighbours; `heads` are those of queries and of keys."""

    def __init__(self, shard: SequenceShard, view: View, scale: float, heads: tuple[int, int]):
        super().__init__(shard, view, scale)
        inner = shard.size // len(view.seats)
        group, place = divmod(shard.rank, inner)
        self._near = range(group * inner, (group + 1) * inner)
        self._ring = Ring(shard, view, scale, tuple(range(place, shard.size, inner)), group)

        tokens = [token_indices(view.length, rank, shard.size, shard.layout or "contiguous") for rank in self._near]
        self._tokens = [len(x) for x in tokens]
        self._order = torch.cat(tokens).argsort()  # of the neighbours' tokens, one after the other
        self._sorted = all(a < b for a, b in itertools.pairwise(self._order.tolist()))

        each, self._key_heads = heads[0] // heads[1], heads[1]
        self._queries = [stretch(heads[0], i, inner) for i in range(inner)]
        self._keys = [(left // each, (right - 1) // each + 1) for left, right in self._queries]
        left, right = self._queries[place]
        first, last = self._keys[place]
        whole = last - first == 1 or (left % each == right % each == 0)
        self._own_keys = None if whole else torch.arange(left, right) // each - first  # the key head of each query head

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """o and the log-sum-exp of this rank's queries, made where each rank had all tokens of some heads."""
        qh, kh, vh = self._to_heads((q, k, v), (self._queries, self._keys, self._keys))
        kh, vh = self._for_queries(kh), self._for_queries(vh)
        oh, lse_h = self._ring.forward(qh, kh, vh)
        self.kept = qh, kh, vh, lse_h.masked_fill(lse_h == float("-inf"), float("inf"))
        o, lse = self._to_tokens((oh.to(q.dtype), lse_h), (self._queries, self._queries))
        return torch.cat(o, dim=2), torch.cat(lse, dim=2)

    def backward(self, inputs: Sequence[Tensor], do: Tensor, D: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this rank's q, k and v, by the same exchanges from the other side."""
        queries, keys = self._queries, self._keys
        if len(inputs) == 4:
            qh, kh, vh, mh = inputs
            doh, Dh = self._to_heads((do, D), (queries, queries))
        else:
            spans = (queries, keys, keys, queries, queries, queries)
            qh, kh, vh, mh, doh, Dh = self._to_heads((*inputs, m, do, D), spans)
            kh, vh = self._for_queries(kh), self._for_queries(vh)
        dqh, dkh, dvh = self._ring.backward((qh, kh, vh), doh, Dh, mh)
        grads = dqh.to(qh.dtype), self._of_keys(dkh).to(kh.dtype), self._of_keys(dvh).to(vh.dtype)
        dq, dk, dv = self._to_tokens(grads, (queries, keys, keys))
        return torch.cat(dq, dim=2), self._added(dk), self._added(dv)

    def _to_heads(self, tensors: Sequence[Tensor], spans: Sequence[Spans]) -> list[Tensor]:
        """(B, own tokens, all heads, ...) -> (B, the neighbours' tokens in order of time, own heads, ...)."""
        me, batch = self._near.index(self.shard.rank), tensors[0].shape[0]
        sends = [
            [x[:, :, slice(*span[i])] for x, span in zip(tensors, spans, strict=True)] for i in range(len(self._near))
        ]
        receives = [[x.new_empty(1).expand(batch, n, *x.shape[2:]) for x in sends[me]] for n in self._tokens]
        arrived = self._all_to_all(sends, receives)
        whole = [torch.cat(parts, dim=1) for parts in zip(*arrived, strict=True)]
        return whole if self._sorted else [x[:, self._order.to(x.device)] for x in whole]

    def _to_tokens(self, tensors: Sequence[Tensor], spans: Sequence[Spans]) -> list[list[Tensor]]:
        """The way back; for each tensor its parts, of the spans of each neighbour's heads."""
        me, batch = self._near.index(self.shard.rank), tensors[0].shape[0]
        if not self._sorted:
            tensors = [x[:, self._order.argsort().to(x.device)] for x in tensors]
        sends = list(zip(*(x.split(self._tokens, dim=1) for x in tensors), strict=True))
        receives = [
            [
                x.new_empty(1).expand(batch, self._tokens[me], span[i][1] - span[i][0], *x.shape[3:])
                for x, span in zip(tensors, spans, strict=True)
            ]
            for i in range(len(self._near))
        ]
        return [list(parts) for parts in zip(*self._all_to_all(sends, receives), strict=True)]

    def _all_to_all(
        self, sends: Sequence[Sequence[Tensor]], receives: Sequence[Sequence[Tensor]]
    ) -> list[Sequence[Tensor]]:
        """By neighbour: what goes there, and what comes from there."""
        pairs = zip(self._near, sends, receives, strict=True)
        others = [pair for pair in pairs if pair[0] != self.shard.rank]
        meeting = exchange.meet(
            self.shard, {rank: x for rank, x, _ in others}, {rank: like for rank, _, like in others}
        )
        arrived = meeting.wait()
        return [arrived.get(rank, own) for rank, own in zip(self._near, sends, strict=True)]

    def _for_queries(self, x: Tensor) -> Tensor:
        """Key heads repeated for each query head, where those of one key head lie on several ranks unevenly."""
        return x if self._own_keys is None else x[:, :, self._own_keys.to(x.device)]

    def _of_keys(self, dx: Tensor) -> Tensor:
        """The transpose of `_for_queries`."""
        if self._own_keys is None:
            return dx
        n = int(self._own_keys[-1]) + 1
        return dx.new_zeros(*dx.shape[:2], n, *dx.shape[3:]).index_add_(2, self._own_keys.to(dx.device), dx)

    def _added(self, parts: Sequence[Tensor]) -> Tensor:
        """Gradients of key heads from every neighbour that read them."""
        B, T, _, K = parts[0].shape
        total = parts[0].new_zeros(B, T, self._key_heads, K, dtype=state_dtype(parts[0]))
        for part, span in zip(parts, self._keys, strict=True):
            total[:, :, slice(*span)] += part
        return total
