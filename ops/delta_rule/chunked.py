"""Fast torch form: the UT transform turns a chunk of C tokens into matrix products and one triangular inverse.

With b the cumulative log decay inside a chunk and G_ij = exp(b_i - b_j) for i >= j (1 without decay),

    A = strictly lower(diag(beta) K K^T * G)        X = (I + A)^-1        P = scale lower(Q K^T * G)
    U = X diag(beta) (V - diag(e^b) K S)            what the chunk's tokens write, given the state S before them
    O = scale diag(e^b) Q S + P U                   S_next = e^{b_C} S + (diag(e^{b_C - b}) K)^T U

All exponents are <= 0. X and the products of keys and queries need no state: they are computed for all chunks of all
documents at once, and only U and S run over the chunk positions. The backward pass is written out: autograd would keep
every intermediate and walk the loop with many small operations.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.ops.chunks import ChunkedTime
from zoo.ops.decay import sum_before, sum_from

# Forward + backward in ms at C = 16 / 32 / 64 / 128, two cores (shared, best of 8), float32, without | with g:
# B = 2, T = 2048, H = 4, K = V = 64: 211 / 108 / 63 / 88 | 81 / 64 / 67 / 102 (the loop without g: 6011);
# B = 8, T = 256, H = 2, K = V = 64: 18 / 15 / 19 / 23 | 18 / 19 / 18 / 25; H = 4, K = V = 32: 18 / 13 / 17 / 24 |
# 17 / 18 / 21 / 36. Flat between 32 and 64; 64 walks half as many chunks and keeps half as many states.
CHUNK = 64
SMALLEST_LOG_DECAY = -100.0  # e^-100 is 4e-44: nothing is left, while b stays finite and its differences exact


def delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S0: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One token, T = 1: the definition in four products; the same arguments and results as the other forms."""
    B, H, K, V = S0.shape
    S, (q, k, u, beta) = S0, (x.to(S0.dtype).reshape(B * H, -1, 1) for x in (q, k, v, beta))
    if g is not None:
        S = S * g.to(S0.dtype).exp().reshape(B, H, 1, 1)
    S = S.reshape(B * H, K, V)
    u = beta * torch.baddbmm(u.mT, k.mT, S, alpha=-1)  # (B * H, 1, V)
    S = torch.baddbmm(S, k, u)
    o = torch.bmm((scale * q).mT, S)
    return o.reshape(B, 1, H, V).to(v.dtype), S.reshape(B, H, K, V)


def delta_rule_chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S0: Tensor, scale: float,
    cuts: tuple[int, ...] | None = None, size: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The whole sequence in chunks of `size` tokens (CHUNK when None, less for short documents); T >= 1."""
    lengths = [q.shape[1]] if cuts is None else [right - left for left, right in itertools.pairwise(cuts)]
    size = size or min(CHUNK, 1 << max(0, max(lengths) - 1).bit_length())
    return _Chunked.apply(q, k, v, beta, g, S0, scale, cuts, size)


class _Decay(NamedTuple):
    """The gates of all chunks, with b the cumulative log decay."""

    between: Tensor  # (N, C, C) G, zero above the diagonal
    before: Tensor  # (N, C, 1) e^b
    after: Tensor  # (N, C, 1) e^{b_C - b}
    total: Tensor  # (N, 1, 1) e^{b_C}


def _decay(g: Tensor) -> _Decay:
    """Of the gates of all chunks, (N, C)."""
    b = g.clamp_min(SMALLEST_LOG_DECAY).cumsum(-1).unsqueeze(-1)
    future = torch.ones(g.shape[1], g.shape[1], dtype=torch.bool, device=g.device).triu_(1)
    between = (b - b.mT).masked_fill_(future, float("-inf")).exp_()
    return _Decay(between, b.exp(), (b[:, -1:] - b).exp(), b[:, -1:].exp())


def _rows(q: Tensor, k: Tensor, beta: Tensor, decay: _Decay | None) -> tuple[Tensor, Tensor, Tensor]:
    """What reads the state before a chunk, what erases from it and what writes to the state after it, (N, C, K)."""
    if decay is None:
        return q, beta * k, k
    return q * decay.before, (beta * decay.before) * k, decay.after * k


def _unit_lower_inverse(A: Tensor) -> Tensor:
    """(I + A)^-1 for strictly lower A, (N, C, C)."""
    N, C, _ = A.shape
    if C < 64:
        eye = torch.eye(C, dtype=A.dtype, device=A.device).expand_as(A)
        return torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)
    # by halves, [[X1, 0], [-X2 A21 X1, X2]]: 1.2 ms instead of 2.2 for N = C = 64 in float32 on one core
    h = C // 2
    X = torch.zeros_like(A)
    X1, X2 = _unit_lower_inverse(torch.cat([A[:, :h, :h], A[:, h:, h:]])).split(N)
    X[:, :h, :h], X[:, h:, h:] = X1, X2
    X[:, h:, :h] = _product(X2, torch.bmm(A[:, h:, :h], X1), -1.0)
    return X


def _product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """factor * a @ b, without a pass over the result for the factor."""
    return torch.baddbmm(a.new_zeros(1, 1, 1), a, b, beta=0, alpha=factor)


class _Chunked(torch.autograd.Function):
    """The whole recurrence as one node. N = chunks * heads rows of chunks, laid out once and kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S0: Tensor, scale: float,
        cuts: tuple[int, ...] | None, size: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        (B, T, H, K), V = q.shape, v.shape[-1]
        dtypes = tuple(None if x is None else x.dtype for x in (q, k, v, beta, g))
        time = ChunkedTime(B, T, size, cuts, q.device)
        q, k, v, beta = (time.split(x.to(S0.dtype)).flatten(0, 1) for x in (q, k, v, beta))
        beta = beta.unsqueeze(-1)
        if g is not None:
            g = time.split(g.to(S0.dtype)).flatten(0, 1)
        decay = None if g is None else _decay(g)
        read, erase, write = _rows(q, k, beta, decay)
        P, M = _product(q, k.mT, scale), torch.bmm(k, k.mT)  # scale lower(Q K^T * G); strictly lower(K K^T * G)
        if decay is None:
            P, M = P.tril_(), M.tril_(-1)
        else:
            P, M = P.mul_(decay.between), M.mul_(decay.between).tril_(-1)
        X = _unit_lower_inverse(beta * M)
        U = beta * v  # (N, C, V), becomes X (U - erase S) below
        before = U.new_empty(len(U), K, V)  # the state before each chunk
        S = time.order(S0).flatten(0, 1).clone()  # (documents * H, K, V)
        for start, stop in time.steps:
            rows, running = slice(start * H, stop * H), S[: (stop - start) * H]
            before[rows] = running
            U[rows] = torch.bmm(X[rows], torch.baddbmm(U[rows], erase[rows], running, alpha=-1))
            if decay is not None:
                running.mul_(decay.total[rows])
            running.baddbmm_(write[rows].mT, U[rows])
        o = torch.bmm(P, U).baddbmm_(read, before, alpha=scale)
        ctx.save_for_backward(q, k, v, beta, g, before, X, U, P, M)
        ctx.time, ctx.scale, ctx.heads, ctx.dtypes = time, scale, H, dtypes
        return time.merge(o.unflatten(0, (-1, H))).to(dtypes[2]), time.unorder(S.unflatten(0, (-1, H)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dS: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, beta, g, before, X, U, P, M = ctx.saved_tensors
        time, H, scale = ctx.time, ctx.heads, ctx.scale
        decay = None if g is None else _decay(g)
        read, erase, write = _rows(q, k, beta, decay)
        do = time.split(do.to(U.dtype)).flatten(0, 1)  # (N, C, V)

        # against time: dU, dR = X^T dU (of the right-hand side R = diag(beta) V - erase S) and dS
        dU, dR = torch.bmm(P.mT, do), torch.empty_like(U)
        asked = _product(read.mT, do, scale)  # (N, K, V) what the outputs ask of the state before their chunk
        after = torch.empty_like(before)  # gradient of the state after each chunk
        running = time.order(dS).flatten(0, 1).clone()
        for start, stop in reversed(time.steps):
            rows = slice(start * H, stop * H)
            d = running[: (stop - start) * H]
            after[rows] = d
            dR[rows] = torch.bmm(X[rows].mT, dU[rows].baddbmm_(write[rows], d))
            if decay is not None:
                d.mul_(decay.total[rows])
            d.add_(asked[rows]).baddbmm_(erase[rows].mT, dR[rows], alpha=-1)
        del dU, asked

        # all chunks at once; d... names gradients of the pieces
        dP = torch.bmm(do, U.mT).tril_()
        dA = _product(dR, U.mT, -1.0).tril_(-1)
        dread = _product(do, before.mT, scale)
        derase = _product(dR, before.mT, -1.0)
        dwrite = torch.bmm(U, after.mT)
        dv = beta * dR
        dbeta = (dR * v).sum(-1).add_((dA * M).sum(-1))
        dg = None
        if decay is None:
            dbeta.add_((derase * k).sum(-1))
            dM = dA.mul_(beta)
            derase.mul_(beta)
        else:
            # b_i - b_j is the sum of g from j + 1 to i: sums over open ranges, so that nothing cancels
            ends = (dread * read).sum(-1) + (derase * erase).sum(-1)  # of b_i, which sums g up to i
            starts = (dwrite * write).sum(-1)  # of b_C - b_j, which sums g after j
            F = (dP * P).add_(dA * (beta * M)).tril_(-1)  # of b_i - b_j
            ends = ends.add_(F.sum(2)).sub_(F.sum(1))
            dg = sum_from(ends).add_(sum_before(starts))
            dg.add_(decay.total[:, 0] * (before * after).sum((1, 2))[:, None])
            dread.mul_(decay.before)
            derase.mul_(decay.before)
            dbeta.add_((derase * k).sum(-1))
            derase.mul_(beta)
            dwrite.mul_(decay.after)
            dP.mul_(decay.between)
            dM = dA.mul_(beta).mul_(decay.between)
        dq = dread.baddbmm_(dP, k, alpha=scale)
        dk = derase.add_(dwrite).baddbmm_(dP.mT, q, alpha=scale).baddbmm_(dM + dM.mT, k)
        grads = tuple(
            None if x is None else time.merge(x.unflatten(0, (-1, H))).to(dtype)
            for x, dtype in zip((dq, dk, dv, dbeta, dg), ctx.dtypes, strict=True)
        )
        return *grads, time.unorder(running.unflatten(0, (-1, H))), None, None, None
