"""Fast torch form of the 2x2 blocks: as the elementwise scan, on planes.

Each of the four entries of the blocks, and each of the two of the inputs, is a plane (B, T, D) of its own, so that a
step is two multiply-adds over contiguous channels: h_t = b_t + A_t[:, 0] h_{t-1}[0] + A_t[:, 1] h_{t-1}[1]. Narrow
steps are widened by walking P chunks of time side by side, first for what each does to any state, [M | g] with
h -> M h + g, then from the states that those make one after the other.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.core.autograd import apply
from zoo.ops.core.differentiation import first_order
from zoo.ops.scans.affine_scan.two_level import chunks_of

# The number of chunks is the elementwise scan's. CPU time of forward / forward + backward on planes, float32, one EPYC
# core of a busy machine (good to about 20 %): B=2 T=2048 D=256 takes 38/76, 22/51, 16/38, 13/33, 15/42 ms at P = 1, 8,
# 32, 64, 128, where copying A and b takes 3; B=1 T=16384 D=512 takes 299/717, 195/591, 190/500, 168/510 ms at 1, 8, 32,
# 64 (copy 166); B=8 T=256 D=128 takes 5.4/13, 3.6/12, 3.4/9, 4.7/10 ms at 1, 8, 16, 32 (copy 0.8).


def block_affine_scan_two_level(
    A: Tensor, b: Tensor, state: Tensor, cuts: tuple[int, ...] | None, *, chunks: int | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence over all documents at once, computed in the dtype of `state`.

    Args:
        A: planes (2, 2, B, T, D); b: (2, B, T, D); state: (2, B, D), or (2, n, D) with the borders `cuts` of documents.
        chunks: P, how many chunks are walked side by side; chosen by size when omitted.
    """
    if cuts is None:
        result: tuple[Tensor, Tensor] = apply(_Scan, A, b, state, chunks)
        return result
    # a document begins where the transition is zero and its own state enters with the input
    filled = [i for i, (left, right) in enumerate(itertools.pairwise(cuts)) if left < right]
    first, ends, index = (
        torch.tensor(x, dtype=torch.int64, device=b.device)
        for x in ([cuts[i] for i in filled], [cuts[i + 1] - 1 for i in filled], filled)
    )
    dtype = b.dtype
    A, b = A.to(state.dtype), b.to(state.dtype)
    entering = A[:, :, :, first] * state[None, :, None, index]  # (2, 2, 1, documents, D)
    b = b.index_add(2, first, entering.sum(1))
    h, _ = apply(_Scan, A.index_fill(3, first, 0), b, torch.zeros_like(state[:, :1]), chunks)
    return h.to(dtype), state.index_copy(1, index, h[:, 0, ends])


class _Steps(NamedTuple):
    """Blocks (2, 2, ...) step by step, by columns; or states (2, ...), by rows. The views are made once a scan."""

    whole: Sequence[Tensor]  # of states
    first: Sequence[Tensor]
    second: Sequence[Tensor]

    @classmethod
    def blocks(cls, A: Tensor) -> "_Steps":
        return cls((), A[:, 0].unbind(-2), A[:, 1].unbind(-2))

    @classmethod
    def states(cls, h: Tensor) -> "_Steps":
        return cls(h.unbind(-2), h[0].unbind(-2), h[1].unbind(-2))

    def backwards(self, begin: int) -> "_Steps":
        return _Steps(*(x[begin::-1] for x in (self.whole, self.first, self.second)))


def _walk(A: _Steps, h: _Steps, before: Tensor) -> Tensor:
    """h[i] holds b[i] and becomes A[i] h[i - 1] + b[i], in place; returns the last."""
    first, second = before.unbind(0)
    last = before
    for left, right, last, own_first, own_second in zip(A.first, A.second, *h, strict=True):
        last.addcmul_(left, first).addcmul_(right, second)
        first, second = own_first, own_second
    return last


def _product(A: Tensor, M: Tensor) -> Tensor:
    """A M on planes: (2, 2, ...) and (2, k, ...)."""
    return _applied(A[:, :1], A[:, 1:], M)


def _applied(left: Tensor, right: Tensor, M: Tensor) -> Tensor:
    """A M of the columns (2, 1, ...) of A."""
    first, second = M.unbind(0)
    return (left * first).addcmul_(right, second)


def _split(x: Tensor, P: int) -> tuple[Tensor, Tensor]:
    """(..., B, T, D) -> P whole chunks side by side, (..., B, P, L, D), and the steps that are left."""
    body = x.shape[-2] // P * P
    return x[..., :body, :].unflatten(-2, (P, -1)), x[..., body:, :]


def block_scan_forward_(A: Tensor, h: Tensor, state: Tensor, chunks: int | None = None) -> None:
    """Turn h, which holds b, into the states, in place: A (2, 2, B, T, D), h (2, B, T, D), state (2, B, D)."""
    if not h.shape[2]:
        return
    P = chunks or chunks_of(*h.shape[1:])
    if P == 1:
        _walk(_Steps.blocks(A), _Steps.states(h), state)
        return
    (A_, A_rest), (h_, h_rest) = _split(A, P), _split(h, P)
    blocks, states = _Steps.blocks(A_), _Steps.states(h_)
    M = torch.cat([A_[..., 0, :], states.whole[0].unsqueeze(1)], dim=1)  # (2, 3, B, P, D): [M | g]
    for left, right, b_t in zip(A_[:, :1].unbind(-2)[1:], A_[:, 1:].unbind(-2)[1:], states.whole[1:], strict=True):
        M = _applied(left, right, M)
        M[:, 2].add_(b_t)
    before = torch.cat([state.unsqueeze(-2), M[:, 2, :, :-1]], dim=-2)  # (2, B, P, D)
    _walk(_Steps.blocks(M[:, :2, :, :-1]), _Steps.states(before[..., 1:, :]), state)
    _walk(blocks, states, before)
    _walk(_Steps.blocks(A_rest), _Steps.states(h_rest), states.whole[-1][..., -1, :])


def block_scan_backward_(A: Tensor, d: Tensor, dlast: Tensor, chunks: int | None = None) -> None:
    """Turn d, which holds dy, into the gradients of the states d_t = dy_t + A_{t+1}^T d_{t+1}, in place."""
    if not d.shape[2]:
        return
    P = chunks or chunks_of(*d.shape[1:])
    A = A.transpose(0, 1)
    if P == 1:
        d[..., -1, :].add_(dlast)
        _walk(_Steps.blocks(A[..., 1:, :]).backwards(-1), _Steps.states(d).backwards(-2), d[..., -1, :])
        return
    (A_, A_rest), (d_, d_rest) = _split(A, P), _split(d, P)
    if d_rest.shape[-2]:  # `dlast`: what reaches the step at hand from after it
        d_rest[..., -1, :].add_(dlast)
        rest = _Steps.blocks(A_rest[..., 1:, :]).backwards(-1)
        first = _walk(rest, _Steps.states(d_rest).backwards(-2), d_rest[..., -1, :])
        dlast = _product(A_rest[..., 0, :], first.unsqueeze(1))[:, 0]
    states, last = _Steps.states(d_), A_[..., -1, :]
    # what enters a chunk from the right leaves it to the left as M c + g
    M = torch.cat([last, _product(last, states.whole[-1].unsqueeze(1))], dim=1)
    lefts, rights = A_[:, :1].unbind(-2), A_[:, 1:].unbind(-2)
    for left, right, dy_t in zip(lefts[-2::-1], rights[-2::-1], states.whole[-2::-1], strict=True):
        M[:, 2].add_(dy_t)
        M = _applied(left, right, M)
    after = torch.cat([M[:, 2, :, 1:], dlast.unsqueeze(-2)], dim=-2)
    _walk(_Steps.blocks(M[:, :2, :, 1:]).backwards(-1), _Steps.states(after).backwards(-2), dlast)
    states.whole[-1].add_(after)
    _walk(_Steps.blocks(A_[..., 1:, :]).backwards(-1), states.backwards(-2), states.whole[-1])


class _Scan(torch.autograd.Function):
    """The whole recurrence as one node. Saved for the backward: A, the states, the state before them."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, b: Tensor, state: Tensor, chunks: int | None) -> tuple[Tensor, Tensor]:
        _, B, T, D = b.shape
        ctx.chunks = chunks or chunks_of(B, T, D)
        h = b.to(state.dtype, copy=True, memory_format=torch.contiguous_format)
        block_scan_forward_(A.to(state.dtype), h, state, ctx.chunks)
        out, last = h.to(b.dtype), (h[:, :, -1] if T else state).clone(memory_format=torch.contiguous_format)
        ctx.save_for_backward(A, out, state)
        return out, last

    @staticmethod
    @first_order("block_affine_scan")
    def backward(ctx: Any, dh: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        A, h, state = ctx.saved_tensors
        if not h.shape[2]:
            return torch.zeros_like(A), torch.zeros_like(h), dlast, None
        d = dh.to(state.dtype, copy=True, memory_format=torch.contiguous_format)
        block_scan_backward_(A.to(state.dtype), d, dlast, ctx.chunks)
        dA = None
        if ctx.needs_input_grad[0]:
            dA = torch.empty(A.shape, dtype=A.dtype, device=A.device)
            for i in range(2):
                for j in range(2):
                    torch.mul(d[i, :, 1:], h[j, :, :-1], out=dA[i, j, :, 1:])
                    torch.mul(d[i, :, 0], state[j], out=dA[i, j, :, 0])
        A_0 = A[:, :, :, 0].transpose(0, 1).to(state.dtype)
        return dA, d.to(h.dtype), _product(A_0, d[:, :, 0].unsqueeze(1))[:, 0], None
