"""Attention by blocks of queries and keys in plain torch: gives the log-sum-exp, never holds more than one block row.

The mathematics is that of `kernels.py`, FlashAttention-2's: an online softmax forward, and a backward that makes the
weights again from m and log l, the largest score and the log of the sum beside it. Rows that see no key keep m = +inf.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zoo.ops.core.autograd import apply
from zoo.ops.core.differentiation import first_order

# One core of a shared CPU, float32, 4 heads of 64, B 2, forward + backward in ms, blocks of 64 | 128 | 256 queries:
# T 2048: 587 | 536 | 582; window 512: 338 | 317 | 464; T 1024, window 128: 99 | 95 | 154. Keys only bound the memory.
BLOCK_QUERIES = 128
BLOCK_KEYS = 4096


def attention_blockwise(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float, key_lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(B, T, H, K), (B, S, Hk, K), (B, S, Hk, V) -> o (B, T, H, V) and its log-sum-exp (B, T, H)."""
    o, lse, _, _ = apply(_Blockwise, q, k, v, key_lengths, causal, window, scale)
    return o, lse


class Blocks:
    """The scores of one call, a block at a time: inputs with heads in front, in the dtype that sums are made in."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_lengths: Tensor | None,
        causal: bool,
        window: int | None,
        scale: float,
    ):
        (self.B, self.T, self.H, self.K), (self.S, self.Hk, self.V) = q.shape, v.shape[1:]
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.q, self.scale = q, scale
        self.k, self.v = (x.transpose(1, 2).to(self.dtype).contiguous() for x in (k, v))  # (B, Hk, S, K or V)
        self.causal, self.window = causal, window
        self.first_key = None if key_lengths is None else self.S - key_lengths.view(-1, 1, 1, 1, 1)

    def rows(self, x: Tensor, left: int, right: int) -> Tensor:
        """(B, T, H, X) -> (B, Hk, G * queries, X) of the queries left ... right - 1, by key head."""
        x = x[:, left:right].to(self.dtype).unflatten(2, (self.Hk, -1))  # (B, m, Hk, G, X)
        return x.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def back(self, x: Tensor, queries: int) -> Tensor:
        """The inverse of `rows`: (B, Hk, G * queries, X) -> (B, queries, H, X)."""
        y: Tensor = x.unflatten(2, (-1, queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        return y

    def queries(self) -> Iterator[tuple[int, int]]:
        """Blocks of queries, (first, one behind the last), in order."""
        for left in range(0, self.T, BLOCK_QUERIES):
            yield left, min(left + BLOCK_QUERIES, self.T)

    def keys(self, left: int, right: int) -> Iterator[tuple[int, int]]:
        """Blocks of the keys that some query of left ... right - 1 may see."""
        offset, first, last = self.S - self.T, 0, self.S
        if self.window is not None:
            first, last = max(0, offset + left - self.window + 1), min(last, offset + right - 1 + self.window)
        if self.causal:
            last = min(last, offset + right)
        for begin in range(first, last, BLOCK_KEYS):
            yield begin, min(begin + BLOCK_KEYS, last)

    def scores(self, q: Tensor, left: int, right: int, begin: int, end: int) -> Tensor:
        """(B, Hk, G * queries, keys), -inf where a query may not see a key; q already scaled."""
        s = q @ self.k[:, :, begin:end].mT
        view = s.unflatten(2, (-1, right - left))
        here, there = self.S - self.T + left, self.S - self.T + right - 1  # positions of the first and last query
        edges: list[tuple[int, int]] = []  # columns that not every query sees
        if self.window is not None and there - self.window + 1 > begin:
            edges.append((begin, min(end, there - self.window + 1)))
        reach = 1 if self.causal else self.window
        if reach is not None and here + reach < end:
            edges.append((max(begin, here + reach), end))
        for i, j in edges:
            distance = torch.arange(here, there + 1, device=s.device)[:, None] - torch.arange(i, j, device=s.device)
            hidden = distance < 0 if self.causal else torch.zeros_like(distance, dtype=torch.bool)
            if self.window is not None:
                hidden |= distance.abs() >= self.window
            view[..., i - begin : j - begin].masked_fill_(hidden, float("-inf"))
        if self.first_key is not None:
            view.masked_fill_(torch.arange(begin, end, device=s.device) < self.first_key, float("-inf"))
        return s


def attend(at: Blocks, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """o (B, T, H, V) in `dtype`, and m and log l (B, T, H) in the dtype of sums; blind rows have m = +inf."""
    o = at.q.new_empty(at.B, at.T, at.H, at.V, dtype=dtype)
    m, log_l = (at.q.new_empty(at.B, at.T, at.H, dtype=at.dtype) for _ in range(2))
    for left, right in at.queries():
        b_q = at.rows(at.q, left, right) * at.scale
        b_m = b_q.new_full((*b_q.shape[:3], 1), float("-inf"))
        b_l, b_o = torch.zeros_like(b_m), b_q.new_zeros(*b_q.shape[:3], at.V)
        for i, (begin, end) in enumerate(at.keys(left, right)):
            s = at.scores(b_q, left, right, begin, end)
            largest = torch.maximum(b_m, s.amax(-1, keepdim=True))
            safe = largest.masked_fill(largest == float("-inf"), 0.0)
            p = s.sub_(safe).exp_()
            if i:
                r = (b_m - safe).exp_()
                b_l.mul_(r)
                b_o.mul_(r)
            b_l += p.sum(-1, keepdim=True)
            b_o += p @ at.v[:, :, begin:end]
            b_m = largest
        blind = b_l == 0
        b_l.masked_fill_(blind, 1.0)
        queries = right - left
        o[:, left:right] = at.back(b_o.div_(b_l), queries)
        m[:, left:right] = at.back(b_m.masked_fill(blind, float("inf")), queries).squeeze(-1)
        log_l[:, left:right] = at.back(b_l.log(), queries).squeeze(-1)
    return o, m, log_l


def gradients(
    at: Blocks, do: Tensor, D: Tensor, m: Tensor, log_l: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (B, T, H, K) in `dtype`, dk and dv (B, S, Hk, K or V) in the dtype of sums.

    D: sum of do * o less the gradient of the log-sum-exp, 0 in blind rows. m and log l as `attend` gives them; one of
    both is enough where it is the log-sum-exp.
    """
    dq = at.q.new_empty(at.q.shape, dtype=dtype)
    dk, dv = torch.zeros_like(at.k), torch.zeros_like(at.v)
    for left, right in at.queries():
        b_q, b_do = at.rows(at.q, left, right) * at.scale, at.rows(do, left, right)
        b_m, b_D = (at.rows(x.unsqueeze(-1), left, right) for x in (m, D))
        b_l = None if log_l is None else at.rows(log_l.unsqueeze(-1), left, right)
        b_dq = torch.zeros_like(b_q)
        for begin, end in at.keys(left, right):
            s = at.scores(b_q, left, right, begin, end).sub_(b_m)
            p = (s if b_l is None else s.sub_(b_l)).exp_()
            dv[:, :, begin:end] += p.mT @ b_do
            ds = (b_do @ at.v[:, :, begin:end].mT).sub_(b_D).mul_(p)
            b_dq += ds @ at.k[:, :, begin:end]
            dk[:, :, begin:end] += ds.mT @ b_q
        dq[:, left:right] = at.back(b_dq.mul_(at.scale), right - left)
    return dq, dk.transpose(1, 2), dv.transpose(1, 2)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, causal: bool, window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        o, m, log_l = attend(Blocks(q, k, v, key_lengths, causal, window, scale), q.dtype)
        lse = (m + log_l).masked_fill_(m == float("inf"), float("-inf"))
        ctx.save_for_backward(q, k, v, key_lengths, o, m, log_l)
        ctx.masks = causal, window, scale
        ctx.mark_non_differentiable(m, log_l)
        return o, lse, m, log_l

    @staticmethod
    @first_order("attention")
    def backward(ctx: Any, do: Tensor, dlse: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, key_lengths, o, m, log_l = ctx.saved_tensors
        at = Blocks(q, k, v, key_lengths, *ctx.masks)
        D = (do.to(at.dtype) * o.to(at.dtype)).sum(-1) - dlse.to(at.dtype)  # (B, T, H)
        D = D.masked_fill(m == float("inf"), 0.0)
        dq, dk, dv = gradients(at, do, D, m, log_l, q.dtype)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None
