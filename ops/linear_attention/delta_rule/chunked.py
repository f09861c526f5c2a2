"""Fast torch form: the UT transform turns a chunk of C tokens into matrix products and one triangular inverse.

With b the cumulative log decay inside a chunk and G_ij = exp(b_i - b_j) for i >= j (1 without decay),

    A = strictly lower(diag(beta) K K^T * G)        X = (I + A)^-1        P = scale lower(Q K^T * G)
    U = X diag(beta) (V - diag(e^b) K S)            what the chunk's tokens write, given the state S before them
    O = scale diag(e^b) Q S + P U                   S_next = e^{b_C} S + (diag(e^{b_C - b}) K)^T U

All exponents are <= 0, and computed as sums of the gates between i and j: differences of b would cancel where a strong
gate shares a chunk with weak ones. X and the products of keys and queries need no state: they are computed for all
chunks of all documents at once, and only U and S run over the chunk positions. The backward pass is written out:
autograd would keep every intermediate and walk the loop with many small operations.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.core.autograd import apply
from zoo.ops.core.chunks import ChunkedTime
from zoo.ops.core.decay import halved, halved_backward
from zoo.ops.core.differentiation import first_order

# Forward + backward, two cores (shared), float32. Chunks of 16 / 32 / 64 / 128, ms, without | with g, B = 2, T = 2048,
# H = 4, K = V = 64: 211 / 108 / 63 / 88 | 81 / 64 / 67 / 102; B = 8, T = 256, H = 2: 18 / 15 / 19 / 23 | 18 / 19 / 18 /
# 25. Flat between 32 and 64; 64 walks half as many chunks and keeps half as many states. Stretches of 2**16 ... 2**21
# numbers: flat (54 to 72 ms, and 528 to 618 at T = 16384) where all at once took 61 and 797.
CHUNK = 64
SEGMENT = 2**18


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
    cuts: tuple[int, ...] | None = None, size: int | None = None, segment: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The whole sequence in chunks of `size` tokens (CHUNK when None, less for short documents).

    `segment`: about how many numbers of one of q, k, v are worked on at a time; SEGMENT when None.
    """
    size = size or chunk_size(q.shape[1], cuts)
    result: tuple[Tensor, Tensor] = apply(_Chunked, q, k, v, beta, g, S0, scale, cuts, size, segment or SEGMENT)
    return result


def chunk_size(length: int, cuts: tuple[int, ...] | None) -> int:
    """CHUNK, or what the longest document needs."""
    longest = length if cuts is None else max(right - left for left, right in itertools.pairwise(cuts))
    return min(CHUNK, 1 << max(0, longest - 1).bit_length())


class _Decay(NamedTuple):
    """The gates of all chunks, with b the cumulative log decay."""

    between: Tensor  # (N, C, C) G, zero above the diagonal
    before: Tensor  # (N, C, 1) e^b
    after: Tensor  # (N, C, 1) e^{b_C - b}
    total: Tensor  # (N, 1, 1) e^{b_C}


def _decay(g: Tensor) -> _Decay:
    """Of the gates of all chunks, (N, C)."""
    between, *ends = halved(g)
    return _Decay(between, *(x.unsqueeze(-1) for x in ends))


def _unit_lower_inverse(A: Tensor) -> Tensor:
    """(I + A)^-1 for strictly lower A, (N, C, C)."""
    N, C, _ = A.shape
    if C < 64:
        eye = torch.eye(C, dtype=A.dtype, device=A.device).expand_as(A)
        inverse: Tensor = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)
        return inverse
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


class Keys(NamedTuple):
    """What a stretch of chunks does to a state, N = chunks * heads; neither queries nor the state play a part."""

    k: Tensor  # (N, C, K)
    v: Tensor  # (N, C, V)
    beta: Tensor  # (N, C, 1)
    decay: _Decay | None
    erase: Tensor  # (N, C, K) diag(beta e^b) K
    write: Tensor  # (N, C, K) diag(e^{b_C - b}) K
    M: Tensor  # (N, C, C) strictly lower(K K^T * G), so that A = diag(beta) M

    def inverse(self) -> Tensor:
        """X, (N, C, C)."""
        return _unit_lower_inverse(self.beta * self.M)


class Queries(NamedTuple):
    """What a stretch of chunks reads from a state and from its own writes."""

    q: Tensor  # (N, C, K)
    read: Tensor  # (N, C, K) diag(e^b) Q
    P: Tensor  # (N, C, C) scale lower(Q K^T * G)
    scale: float

    def output(self, before: Tensor, U: Tensor) -> Tensor:
        """O, (N, C, V), of the states before the chunks and what they write."""
        return torch.bmm(self.P, U).baddbmm_(self.read, before, alpha=self.scale)

    def asked(self, do: Tensor) -> tuple[Tensor, Tensor]:
        """What the outputs' gradient asks of the writes, (N, C, V), and of the states before the chunks, (N, K, V)."""
        return torch.bmm(self.P.mT, do), _product(self.read.mT, do, self.scale)


def keys(
    time: ChunkedTime, positions: tuple[int, int], dtype: torch.dtype,
    k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None,
) -> Keys:  # fmt: skip
    """Of a range of chunk positions."""
    k, v, beta = (time.part(x, positions, dtype) for x in (k, v, beta))
    beta = beta.unsqueeze(-1)
    M = torch.bmm(k, k.mT)
    if g is None:
        return Keys(k, v, beta, None, beta * k, k, M.tril_(-1))
    d = _decay(time.part(g, positions, dtype))
    return Keys(k, v, beta, d, (beta * d.before) * k, d.after * k, M.mul_(d.between).tril_(-1))


def queries(
    time: ChunkedTime, positions: tuple[int, int], dtype: torch.dtype, q: Tensor, p: Keys, scale: float
) -> Queries:
    """Of the same range of chunk positions as `p`."""
    q = time.part(q, positions, dtype)
    P = _product(q, p.k.mT, scale)
    if p.decay is None:
        return Queries(q, q, P.tril_(), scale)
    return Queries(q, q * p.decay.before, P.mul_(p.decay.between), scale)


def run(p: Keys, X: Tensor, U: Tensor, S: Tensor, steps: list[slice]) -> Tensor:
    """The recurrence over a stretch: the states before its chunks, (N, K, V).

    U, given as diag(beta) V, becomes what the tokens write; S, the state before the stretch, that after it.
    """
    before = U.new_empty(len(U), *S.shape[1:])
    for rows in steps:
        running = S[: rows.stop - rows.start]
        before[rows] = running
        U[rows] = torch.bmm(X[rows], torch.baddbmm(U[rows], p.erase[rows], running, alpha=-1))
        if p.decay is not None:
            running.mul_(p.decay.total[rows])
        running.baddbmm_(p.write[rows].mT, U[rows])
    return before


def run_wide(p: Keys, X: Tensor, U: Tensor, S: Tensor, steps: list[slice]) -> None:
    """The recurrence for V columns and others that are written nothing; U and S as given to `run`, U is left alone."""
    V = U.shape[-1]
    for rows in steps:
        R = _product(p.erase[rows], S, -1.0)
        R[..., :V].add_(U[rows])
        if p.decay is not None:
            S.mul_(p.decay.total[rows])
        S.baddbmm_(p.write[rows].mT, torch.bmm(X[rows], R))


def run_again(p: Keys, U: Tensor, S: Tensor, steps: list[slice]) -> Tensor:
    """The states before the chunks once more, of what the tokens write; S, the state before the stretch, is used up."""
    before = U.new_empty(len(U), *S.shape[1:])
    for rows in steps:
        now = S[: rows.stop - rows.start]
        before[rows] = now
        if p.decay is not None:
            now.mul_(p.decay.total[rows])
        now.baddbmm_(p.write[rows].mT, U[rows])
    return before


def run_back(p: Keys, X: Tensor, dU: Tensor, asked: Tensor, dS: Tensor, steps: list[slice]) -> tuple[Tensor, Tensor]:
    """Against time: the gradients of the right-hand side R = diag(beta) V - erase S and of the states after the chunks.

    dS, the gradient of the state after the stretch, becomes that before it; dU, what the outputs ask, is used up.
    """
    dR, after = torch.empty_like(dU), torch.empty_like(asked)
    for rows in reversed(steps):
        d = dS[: rows.stop - rows.start]
        after[rows] = d
        dR[rows] = torch.bmm(X[rows].mT, dU[rows].baddbmm_(p.write[rows], d))
        if p.decay is not None:
            d.mul_(p.decay.total[rows])
        d.add_(asked[rows]).baddbmm_(p.erase[rows].mT, dR[rows], alpha=-1)
    return dR, after


class _Chunked(torch.autograd.Function):
    """The whole recurrence as one node, a stretch of chunks at a time, so that what is worked on stays in the cache.

    Saved for the backward: the inputs, X and U, and the states where stretches begin.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S0: Tensor, scale: float,
        cuts: tuple[int, ...] | None, size: int, segment: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        (B, T, H, K), V = q.shape, v.shape[-1]
        time = ChunkedTime(B, T, size, cuts, q.device)
        segments, kept = time.segments(segment, H * max(K, V)), []
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        S = time.order(S0).flatten(0, 1).clone()  # (documents * H, K, V)
        for positions in segments:
            p = keys(time, positions, S0.dtype, k, v, beta, g)
            X, U = p.inverse(), p.beta * p.v
            kept += [X, U, S.clone()]
            before = run(p, X, U, S, time.rows(positions, H))
            o = queries(time, positions, S0.dtype, q, p, scale).output(before, U)
            time.put(out, o.unflatten(0, (-1, H)), positions)
        ctx.save_for_backward(q, k, v, beta, g, *kept)
        ctx.time, ctx.scale, ctx.segments = time, scale, segments
        return out, time.unorder(S.unflatten(0, (-1, H)))

    @staticmethod
    @first_order("delta_rule")
    def backward(ctx: Any, do: Tensor, dS: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, beta, g, *kept = ctx.saved_tensors
        time, scale, H = ctx.time, ctx.scale, q.shape[2]
        inputs = (q, k, v, beta, g)
        grads = [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        running = time.order(dS).flatten(0, 1).clone()
        for i, positions in reversed(list(enumerate(ctx.segments))):
            p = keys(time, positions, dS.dtype, k, v, beta, g)
            r = queries(time, positions, dS.dtype, q, p, scale)
            X, U, S = kept[3 * i : 3 * i + 3]
            rows, do_ = time.rows(positions, H), time.part(do, positions, dS.dtype)
            before = run_again(p, U, S.clone(), rows)
            parts = gradients(p, r, U, before, do_, *run_back(p, X, *r.asked(do_), running, rows))
            for out, y in zip(grads, parts, strict=True):
                if out is not None and y is not None:
                    time.put(out, y.unflatten(0, (-1, H)), positions)
        return *grads, time.unorder(running.unflatten(0, (-1, H))), None, None, None, None


def pull_back(p: Keys, X: Tensor, dU: Tensor, asked: Tensor, dS: Tensor, steps: list[slice]) -> None:
    """dS alone of `run_back`; dU is left alone."""
    for rows in reversed(steps):
        dR = torch.bmm(X[rows].mT, torch.baddbmm(dU[rows], p.write[rows], dS))
        if p.decay is not None:
            dS.mul_(p.decay.total[rows])
        dS.add_(asked[rows]).baddbmm_(p.erase[rows].mT, dR, alpha=-1)


def gradients(
    p: Keys, r: Queries, U: Tensor, before: Tensor, do: Tensor, dR: Tensor, after: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, beta and g of a stretch, all chunks at once; `after` and dR are those of `run_back`."""
    dP = torch.bmm(do, U.mT).tril_()
    dA = _product(dR, U.mT, -1.0).tril_(-1)
    dread = _product(do, before.mT, r.scale)
    derase = _product(dR, before.mT, -1.0)
    dwrite = torch.bmm(U, after.mT)
    dv = p.beta * dR
    dbeta = (dR * p.v).sum(-1).add_((dA * p.M).sum(-1))
    dg = None
    if p.decay is None:
        dbeta.add_((derase * p.k).sum(-1))
        dM = dA.mul_(p.beta)
        derase.mul_(p.beta)
    else:
        ends = (dread * r.read).sum(-1) + (derase * p.erase).sum(-1)  # of b_i, which sums g up to i
        starts = (dwrite * p.write).sum(-1)  # of b_C - b_j, which sums g after j
        pairs = (dP * r.P).add_(dA * (p.beta * p.M))  # of b_i - b_j, the sum of g from j + 1 to i
        dg = halved_backward(pairs, ends, starts, p.decay.total[:, 0, 0] * (before * after).sum((1, 2)))
        dread.mul_(p.decay.before)
        derase.mul_(p.decay.before)
        dbeta.add_((derase * p.k).sum(-1))
        derase.mul_(p.beta)
        dwrite.mul_(p.decay.after)
        dP.mul_(p.decay.between)
        dM = dA.mul_(p.beta).mul_(p.decay.between)
    dq = dread.baddbmm_(dP, p.k, alpha=r.scale)
    dk = derase.add_(dwrite).baddbmm_(dP.mT, r.q, alpha=r.scale).baddbmm_(dM + dM.mT, p.k)
    return dq, dk, dv, dbeta, dg
