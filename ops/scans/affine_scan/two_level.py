"""Fast torch form: steps of time that are wide enough to be worth a call each, and a backward that is one more scan.

A step on a few thousand numbers takes as long as calling it. So when the rows of one step are narrow, time is cut into
P chunks of L steps which are walked side by side, P times as wide, in three passes:

    1. each chunk from a zero state: what it does to any state, h -> p * h + g;
    2. the chunks one after the other: the state before each;
    3. each chunk again, now from its own state, writing h.

That is about 4 L + P calls in place of T, for twice the arithmetic, and nothing more is kept. Zeros, negative and large
transitions are all alike, since nothing is divided and no logarithm is taken.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.ops.core.autograd import apply
from zoo.ops.core.differentiation import first_order

# Numbers in one step of P chunks side by side. CPU time of forward / forward + backward, float32, one EPYC core of a
# busy machine (good to about 20 %): B=2 T=2048 D=256 takes 10/31, 5.8/13, 3.3/11, 3.4/7.3, 2.8/7.3, 3.5/14 ms at P = 1
# (the plain loop), 8, 16, 32, 64, 128, where copying a and b takes 0.9; B=1 T=16384 D=512 takes 97/244, 63/158, 51/153,
# 60/149 ms at 1, 8, 32, 64 (copy 50: fresh memory); B=8 T=256 D=128 takes 2.3/6.7, 1.0/1.8, 0.7/2.0 at 1, 16, 32 (copy
# 0.1); B=1 T=1024 D=24576 takes 110/261, 113/331, 110/320 at 1, 4, 8 (copy 168). Flat about P B D = 8192 ... 32768.
WIDTH = 16384


def affine_scan_two_level(
    a: Tensor, b: Tensor, state: Tensor, cuts: tuple[int, ...] | None, *, chunks: int | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence over all documents at once, computed in the dtype of `state`.

    Args:
        a, b: (B, T, D), real or complex; state: (B, D), or (n, D) with the borders `cuts` of packed documents.
        chunks: P, how many chunks are walked side by side; chosen by size when omitted.
    """
    if cuts is None:
        result: tuple[Tensor, Tensor] = apply(_Scan, a, b, state, chunks)
        return result
    # a document begins where the transition is zero and its own state enters with the input
    filled = [i for i, (left, right) in enumerate(itertools.pairwise(cuts)) if left < right]
    first, ends, index = (
        torch.tensor(x, dtype=torch.int64, device=b.device)
        for x in ([cuts[i] for i in filled], [cuts[i + 1] - 1 for i in filled], filled)
    )
    dtype = b.dtype
    a, b = a.to(state.dtype), b.to(state.dtype)
    b = b.index_add(1, first, a[:, first] * state[index])
    h, _ = apply(_Scan, a.index_fill(1, first, 0), b, torch.zeros_like(state[:1]), chunks)
    return h.to(dtype), state.index_copy(0, index, h[0, ends])


def _walk(a: Sequence[Tensor], h: Sequence[Tensor], before: Tensor) -> Tensor:
    """h[i] holds b[i] and becomes a[i] * h[i - 1] + b[i], in place; returns the last."""
    for a_t, h_t in zip(a, h, strict=True):
        before = h_t.addcmul_(a_t, before)
    return before


def chunks_of(B: int, T: int, D: int) -> int:
    """P: wide enough steps, and no more chunks than there are steps in one; 1 is the plain loop."""
    return max(1, min(WIDTH // max(1, B * D), int(T**0.5)))


def _split(x: Tensor, P: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """(B, T, D) -> the L steps of P whole chunks side by side, each (B, P, D), and the steps that are left, (B, D)."""
    body = x.shape[1] // P * P
    return x[:, :body].unflatten(1, (P, -1)).unbind(2), x[:, body:].unbind(1)


def scan_forward_(a: Tensor, h: Tensor, state: Tensor, chunks: int | None = None) -> None:
    """Turn h, which holds b, into the states, in place: a, h (B, T, D), state (B, D), all of one dtype."""
    if not h.shape[1]:
        return
    P = chunks or chunks_of(*h.shape)
    if P == 1:
        _walk(a.unbind(1), h.unbind(1), state)
        return
    (a_, a_rest), (h_, h_rest) = _split(a, P), _split(h, P)
    g, p = (x[0].clone(memory_format=torch.contiguous_format) for x in (h_, a_))
    for a_t, b_t in zip(a_[1:], h_[1:], strict=True):
        g.mul_(a_t).add_(b_t)
        p.mul_(a_t)
    before = torch.cat([state.unsqueeze(1), g[:, :-1]], dim=1)  # (B, P, D)
    _walk(p.unbind(1)[:-1], before.unbind(1)[1:], state)
    _walk(a_, h_, before)
    _walk(a_rest, h_rest, h_[-1][:, -1])


def scan_backward_(a: Tensor, d: Tensor, dlast: Tensor, chunks: int | None = None) -> None:
    """Turn d, which holds dy, into the gradients of the states d_t = dy_t + a_{t+1} * d_{t+1}, in place."""
    if not d.shape[1]:
        return
    P = chunks or chunks_of(*d.shape)
    if P == 1:
        d[:, -1].add_(dlast)
        _walk(a.unbind(1)[:0:-1], d.unbind(1)[-2::-1], d[:, -1])
        return
    (a_, a_rest), (d_, d_rest) = _split(a, P), _split(d, P)
    if d_rest:  # `dlast`: what reaches the step at hand from after it
        d_rest[-1].add_(dlast)
        dlast = a_rest[0] * _walk(a_rest[:0:-1], d_rest[-2::-1], d_rest[-1])
    g, p = (x[-1].clone(memory_format=torch.contiguous_format) for x in (d_, a_))
    for a_next, a_t, dy_t in zip(a_[:0:-1], a_[-2::-1], d_[-2::-1], strict=True):
        g.mul_(a_next).add_(dy_t)
        p.mul_(a_t)
    g.mul_(a_[0])  # what leaves a chunk to the left
    after = torch.cat([g[:, 1:], dlast.unsqueeze(1)], dim=1)
    _walk(p.unbind(1)[:0:-1], after.unbind(1)[-2::-1], dlast)
    d_[-1].add_(after)
    _walk(a_[:0:-1], d_[-2::-1], d_[-1])


class _Scan(torch.autograd.Function):
    """The whole recurrence as one node. Saved for the backward: a, the states, the state before them."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, state: Tensor, chunks: int | None) -> tuple[Tensor, Tensor]:
        ctx.chunks = chunks or chunks_of(*b.shape)
        h = b.to(state.dtype, copy=True, memory_format=torch.contiguous_format)
        scan_forward_(a.to(state.dtype), h, state, ctx.chunks)
        out, last = h.to(b.dtype), (h[:, -1] if h.shape[1] else state).clone()
        ctx.save_for_backward(a, out, state)
        return out, last

    @staticmethod
    @first_order("affine_scan")
    def backward(ctx: Any, dh: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        a, h, state = (x.conj().resolve_conj() for x in ctx.saved_tensors)  # of complex numbers; nothing for real ones
        if not h.shape[1]:
            return torch.zeros_like(a), torch.zeros_like(h), dlast, None
        d = dh.to(state.dtype, copy=True, memory_format=torch.contiguous_format)
        scan_backward_(a.to(state.dtype), d, dlast, ctx.chunks)
        da = None
        if ctx.needs_input_grad[0] and torch.compiler.is_compiling():  # which takes no part of a tensor as `out`
            da = (torch.cat([state.unsqueeze(1), h[:, :-1]], dim=1) * d).to(a.dtype)
        elif ctx.needs_input_grad[0]:
            da = torch.empty(d.shape, dtype=a.dtype, device=a.device)
            torch.mul(d[:, 1:], h[:, :-1], out=da[:, 1:])
            torch.mul(d[:, 0], state, out=da[:, 0])
        return da, d.to(h.dtype), a[:, 0] * d[:, 0], None
