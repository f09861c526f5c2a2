"""Fast torch form: chunks of time, batched matrix products, a backward in closed form, all exponents <= 0.

The weight of token j for token i >= j carries the decay of the steps between them, exp(g_{j+1} + ... + g_i). As a
product of one factor for i and one for j it overflows under strong gates, unless the border r between both factors lies
between j and i. So a chunk of C tokens is halved again and again: at the level where i is in the second half of a block
and j in its first half,

    P[i, j] = scale * (q_i * exp(F_i)) . (k_j * exp(R_j)),   F_i = sum of g after r to i,   R_j = sum of g after j to r,

one small matrix product per pair of halves. F and R double with the level by addition alone (no difference of running
sums ever appears, so that nothing cancels), and their values at the full chunk are the factors of the state: q exp(F)
reads the state before the chunk, k exp(R) writes to the state after it. The backward runs the same levels downwards.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.ops.chunks import ChunkedTime

# CPU time of forward + backward, float32, B=2 T=2048 H=4 K=V=64, one EPYC core of a busy machine (good to about 15 %):
# chunks of 16, 32, 64 take 225, 170, 246 ms (at K=V=32, 16 and 32 are alike); segments of 2**15 ... 2**19 numbers take
# 235, 185, 178, 170, 240 ms: shorter ones pay for launches, longer ones fall out of the cache. On 2
# cores beside other load: 130 ms, 9 times as fast as the loop (1180 ms); T=16384 takes 6.8 times as long as T=2048.
CHUNK = 32
SEGMENT = 2**18


def gated_linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One token, T = 1, without the machinery of chunks: what decoding calls."""
    q1, k1, v1, g1 = (x[:, 0].to(state.dtype) for x in (q, k, v, g))
    S = torch.addcmul(k1.unsqueeze(-1) * v1.unsqueeze(-2), g1.exp().unsqueeze(-1), state)  # (B, H, K, V)
    o = ((q1 * scale).unsqueeze(-2) @ S).squeeze(-2)  # (B, H, V)
    return o.unsqueeze(1).to(v.dtype), S


def gated_linear_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor,
    scale: float,
    cuts: tuple[int, ...] | None,
    *,
    chunk: int = CHUNK,
    segment: int = SEGMENT,
) -> tuple[Tensor, Tensor]:
    """The recurrence over all documents at once, computed in the dtype of `state`.

    Args:
        chunk: tokens per chunk, a power of two.
        segment: about how many numbers of one of q, k, v are worked on at a time; bounds the temporary memory.
    """
    B, T = q.shape[:2]
    longest = T if cuts is None else max(right - left for left, right in itertools.pairwise(cuts))
    chunk = min(chunk, 1 << max(0, longest - 1).bit_length())
    time = ChunkedTime(B, T, chunk, cuts, q.device)
    return _Chunked.apply(q, k, v, g, state, scale, time, segment)


class _Level(NamedTuple):
    """One halving of the chunk into pairs of halves of s rows; all (N, C / 2s, s, K)."""

    q: Tensor  # q exp(F) of the second halves
    k: Tensor  # k exp(R) of the first halves
    read: Tensor  # exp(F)
    write: Tensor  # exp(R)


class _Factors(NamedTuple):
    """What a stretch of chunks needs of q, k and g; N = chunks * heads."""

    P: Tensor  # (N, C, C) weights inside the chunk, lower triangular, without the scale
    q: Tensor  # (N, C, K) q exp(F)
    k: Tensor  # (N, C, K) k exp(R)
    read: Tensor  # (N, C, K) exp(F)
    write: Tensor  # (N, C, K) exp(R)
    levels: list[_Level]  # from the smallest halves to the largest


def _halves(x: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """(N, C, K) -> first and second halves of its blocks of 2s rows, both views (N, C / 2s, s, K)."""
    pairs = x.unflatten(1, (-1, 2, s))
    return pairs[:, :, 0], pairs[:, :, 1]


def _pairs(P: Tensor, s: int) -> Tensor:
    """(N, C, C) -> the blocks [second half, first half], a view (N, C / 2s, s, s)."""
    n = P.shape[1] // (2 * s)
    blocks = P.view(-1, n, 2, s, n, 2, s)[:, :, 1, :, :, 0]  # (N, n, s, n, s)
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _factors(q: Tensor, k: Tensor, g: Tensor, keep: bool) -> _Factors:
    """Weights and decays of a stretch of chunks, (N, C, K) each; `keep` the levels for a backward."""
    N, C, _ = q.shape
    P = q.new_zeros(N, C, C)
    P.diagonal(dim1=1, dim2=2).copy_((q * k).sum(-1))
    F, R, levels = g.clone(), torch.zeros_like(g), []
    s = 1
    while s < C:
        (R1, _), (F1, F2) = _halves(R, s), _halves(F, s)
        read, write = F2.exp(), R1.exp()
        q2, k1 = _halves(q, s)[1] * read, _halves(k, s)[0] * write
        _pairs(P, s).copy_(q2 @ k1.mT if s > 1 else (q2 * k1).sum(-1, keepdim=True))
        if keep:
            levels.append(_Level(q2, k1, read, write))
        R1 += F2[:, :, -1:]
        F2 += F1[:, :, -1:]
        s *= 2
    read, write = F.exp_(), R.exp_()
    return _Factors(P, q * read, k * write, read, write, levels)


class _Chunked(torch.autograd.Function):
    """The whole recurrence as one node. Saved for the backward: the inputs, and the states where segments begin."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        state: Tensor,
        scale: float,
        time: ChunkedTime,
        segment: int,
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        S = time.order(state).clone()
        segments, starts = _segments(time, segment, q.shape[2] * max(q.shape[3], v.shape[3])), []
        for positions in segments:
            starts.append(S.clone())
            q_, k_, v_, g_ = (_part(time, x, positions, state.dtype) for x in (q, k, v, g))
            f = _factors(q_, k_, g_, keep=False)
            before = _scan(_steps(time, positions), f.read[:, -1], f.k.mT @ v_, S)
            o = (f.P @ v_).baddbmm_(f.q, before, beta=scale, alpha=scale)
            time.put(out, o.unflatten(0, (-1, q.shape[2])), positions)
        ctx.save_for_backward(q, k, v, g, *starts)
        ctx.scale, ctx.time, ctx.segments = scale, time, segments
        return out, time.unorder(S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dS: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, g, *starts), time = ctx.saved_tensors, ctx.time
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g)]
        dS = time.order(dS).clone()
        for positions, S in zip(reversed(ctx.segments), reversed(starts), strict=True):
            q_, k_, v_, g_, do_ = (_part(time, x, positions, dS.dtype) for x in (q, k, v, g, do))
            do_ = do_ * ctx.scale  # not in place: the part may be a view of `do`
            f = _factors(q_, k_, g_, keep=True)
            decay, steps = f.read[:, -1], _steps(time, positions)
            before = _scan(steps, decay, f.k.mT @ v_, S.clone())
            after = _scan(steps[::-1], decay, f.q.mT @ do_, dS)  # gradients of the states after each chunk
            dP = do_ @ v_.mT
            dv = (f.P.mT @ do_).baddbmm_(f.k, after)
            # through the states; dF and dR are the gradients of the log decays F and R
            dq = (do_ @ before.mT).mul_(f.read)
            dk = (v_ @ after.mT).mul_(f.write)
            dF, dR = dq * q_, dk * k_
            dF[:, -1].addcmul_(decay, before.mul_(after).sum(-1))
            # inside the chunk
            diagonal = dP.diagonal(dim1=1, dim2=2).unsqueeze(-1)
            dq.addcmul_(diagonal, k_)
            dk.addcmul_(diagonal, q_)
            for level in reversed(f.levels):
                _level_backward(level, dP, q_, k_, dq, dk, dF, dR)
            for out, y in zip(grads, (dq, dk, dv, dF), strict=True):
                time.put(out, y.unflatten(0, (-1, q.shape[2])), positions)
        return *grads, time.unorder(dS), None, None, None


def _level_backward(
    level: _Level, dP: Tensor, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor, dF: Tensor, dR: Tensor
) -> None:
    """Add one level's part to dq and dk, and turn dF and dR of the blocks of 2s rows into those of their halves."""
    s = level.q.shape[2]
    (dF1, dF2), (dR1, _) = _halves(dF, s), _halves(dR, s)
    total1, total2 = dF2.sum(2), dR1.sum(2)  # F2 was raised by the last F1, R1 by the last F2
    block = _pairs(dP, s).contiguous()
    dq2, dk1 = _product(block, level.k).mul_(level.read), _product(block.mT, level.q).mul_(level.write)
    _halves(dq, s)[1].add_(dq2)
    _halves(dk, s)[0].add_(dk1)
    dF2.addcmul_(dq2, _halves(q, s)[1])
    dR1.addcmul_(dk1, _halves(k, s)[0])
    dF1[:, :, -1] += total1
    dF2[:, :, -1] += total2


def _product(a: Tensor, x: Tensor) -> Tensor:
    """a @ x for squares a (..., s, s); batched products of the tiniest ones are slower than their sum written out."""
    s = a.shape[-1]
    if s > 2:
        return a @ x
    y = a[..., :1] * x[..., :1, :]
    return y if s == 1 else y.addcmul_(a[..., 1:], x[..., 1:, :])


def _segments(time: ChunkedTime, numbers: int, width: int) -> list[tuple[int, int]]:
    """Cut the chunk positions into ranges that hold about `numbers` elements at `width` elements per token."""
    ranges: list[tuple[int, int]] = []
    first, held = 0, 0
    for position, (start, stop) in enumerate(time.steps):
        size = (stop - start) * time.size * width
        if held and held + size > numbers:
            ranges.append((first, position))
            first, held = position, 0
        held += size
    return [*ranges, (first, len(time.steps))] if time.steps else []


def _part(time: ChunkedTime, x: Tensor, positions: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(B, T, H, K) -> the chunks of a range of positions, (N, C, K)."""
    return time.split(x, positions).flatten(0, 1).to(dtype)


def _steps(time: ChunkedTime, positions: tuple[int, int]) -> list[tuple[int, int]]:
    """The slices of the chunk axis at each position, counted from the first of them."""
    steps = time.steps[slice(*positions)]
    return [(start - steps[0][0], stop - steps[0][0]) for start, stop in steps]


def _scan(steps: list[tuple[int, int]], decay: Tensor, write: Tensor, S: Tensor) -> Tensor:
    """S -> decay * S + write over the chunks of `steps` in order; S in place, and the S that each chunk meets returned.

    decay (N, K), write (N, K, V), with N = chunks * heads; S (documents, H, K, V).
    """
    met = torch.empty_like(write)
    decay, write_, met_ = (x.unflatten(0, (-1, S.shape[1])) for x in (decay.unsqueeze(-1), write, met))
    for start, stop in steps:
        here, now = slice(start, stop), S[: stop - start]
        met_[here] = now
        torch.addcmul(write_[here], decay[here], now, out=now)
    return met
