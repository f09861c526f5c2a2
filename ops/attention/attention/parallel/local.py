"""One block of attention on this rank, and sums of blocks: the only arithmetic that the methods share.

`forward` gives a block's softmax and its log-sum-exp, `backward` its share of the gradients from the log-sum-exp over
all blocks: p = exp(s - lse), dv = p^T do, ds = p (do v^T - D), dq = ds k, dk = ds^T q. So blocks merge forward, and
add backward. Whoever has a faster form for a device puts it here.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from zoo.ops.attention.attention.blockwise import BLOCK_KEYS, Blocks, attend, gradients
from zoo.ops.attention.attention.parallel.view import Block
from zoo.ops.core.dispatch import state_dtype


class _Seen(Blocks):
    """Scores of queries that see one interval of the keys each."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float):
        super().__init__(q, k, v, None, False, None, scale)
        self.begin, self.end = block.begin, block.end
        self._moved = block.begin.to(q.device), block.end.to(q.device)

    def keys(self, left: int, right: int) -> Iterator[tuple[int, int]]:
        first, last = int(self.begin[left:right].min()), int(self.end[left:right].max())
        for begin in range(first, last, BLOCK_KEYS):
            yield begin, min(begin + BLOCK_KEYS, last)

    def scores(self, q: Tensor, left: int, right: int, begin: int, end: int) -> Tensor:
        s = q @ self.k[:, :, begin:end].mT
        if int(self.begin[left:right].max()) > begin or int(self.end[left:right].min()) < end:
            key = torch.arange(begin, end, device=s.device)
            first, last = (x[left:right, None] for x in self._moved)
            s.unflatten(2, (-1, right - left)).masked_fill_((key < first) | (key >= last), float("-inf"))
        return s


def forward(q: Tensor, k: Tensor, v: Tensor, *, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    """The block's rows of q, columns of k and v -> o (B, rows, H, V), lse (B, rows, H), in the dtype of sums."""
    o, m, log_l = attend(_Seen(q, k, v, block, scale), state_dtype(q))
    return o, (m + log_l).masked_fill_(m == float("inf"), float("-inf"))


def backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, D: Tensor, m: Tensor, *, block: Block, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's dq, dk, dv in the dtype of sums; D = sum of do * o - dlse and m = lse over all keys, +inf if none."""
    return gradients(_Seen(q, k, v, block, scale), do, D, m, None, state_dtype(q))


class Sum:
    """Attention over blocks of keys, one after the other: o (B, T, H, V) and lse (B, T, H)."""

    def __init__(self, q: Tensor, v: Tensor):
        shape, dtype = q.shape[:3], state_dtype(q)
        self.o = q.new_zeros(*shape, v.shape[3], dtype=dtype)
        self.lse = q.new_full(shape, float("-inf"), dtype=dtype)
        self._empty = True

    def add(self, rows: tuple[int, int], o: Tensor, lse: Tensor) -> None:
        """A block's result for some of the rows.

        o <- o + exp(l' - l)(o' - o) with l = log(exp(l) + exp(l')): exponents are at most 0, and of two that saw
        nothing none is changed.
        """
        into_o, into_lse = self.o[:, slice(*rows)], self.lse[:, slice(*rows)]
        if self._empty:
            into_o.copy_(o)
            into_lse.copy_(lse)
            self._empty = False
            return
        total = torch.logaddexp(into_lse, lse)
        weight = (lse - total.masked_fill(total == float("-inf"), 0.0)).exp()
        into_o.add_(weight.unsqueeze(-1) * (o - into_o))
        into_lse.copy_(total)
