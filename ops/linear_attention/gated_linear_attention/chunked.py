"""Fast torch form: chunks of time, batched matrix products, a backward in closed form, bounded exponents.

The weight of token j for token i >= j carries the decay of the steps between them, exp(g_{j+1} + ... + g_i). As a
product of one factor for i and one for j it overflows under strong gates, unless the border r between both factors lies
between j and i. So a chunk of C tokens is halved again and again: at the level where i is in the second half of a block
and j in its first half,

    P[i, j] = (q_i * exp(F_i)) . (k_j * exp(R_j)),   F_i = sum of g after r to i,   R_j = sum of g after j to r,

one matrix product per pair of halves, all exponents <= 0. The halving ends at blocks of b tokens, b = 1 for any gates
at all. Where no gate is strong (the sums over b / 2 tokens stay above -LIMIT, looked up in the data) b is 32 or 16:
inside such a block the border may be its middle m for all pairs, which costs one product and at most exp(LIMIT). So the
rounding of an output, not its value, may depend on gates of later tokens.

Rows enter as Q' = q exp(sum after m to i) and K' = k exp(-sum after m to j), once; all levels and the states see them
through one factor a block, exp(A), A = sum from the start of the half to m, and exp(Z), Z = sum after m to its end.
A and Z double with the level by addition alone. The backward runs the same levels downwards.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.core.autograd import apply
from zoo.ops.core.chunks import ChunkedTime
from zoo.ops.core.differentiation import first_order

# CPU time of forward + backward, float32, B=2 T=2048 H=4 K=V=64, a model's gates, one core of a busy machine (to about
# 15 %): chunks of 32 / 64 / 128 take 82 / 88 / 105 ms with blocks of 32, 94 / 102 / 114 with blocks of 16, and 130
# with blocks of 1 (chunks of 32); stretches of 2**16 ... 2**19 numbers are alike.
CHUNK = 32
# What enters at a block's edge passes the middle and returns: the two exponents of a weight may have opposite signs,
# and their rounding, LIMIT * 2^-24, is the weight's. With one gate of -2 ... -29 among every 4 ... 24 weak ones the
# worst float32 errors of all outputs and gradients were 1.3e-6 at 30, 5.9e-7 at 12, 4.4e-7 at 8; the loop's are 1e-7.
BLOCKS = (32, 16)
LIMIT = 12.0
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
    result: tuple[Tensor, Tensor] = apply(_Chunked, q, k, v, g, state, scale, time, segment)
    return result


class _Level(NamedTuple):
    """One halving into pairs of halves of s rows; the rows (N, C / 2s, s, K), the factors by block, s / b of them."""

    q: Tensor  # Q' exp(A) of the second halves
    k: Tensor  # K' exp(Z) of the first halves
    read: Tensor  # exp(A)
    write: Tensor  # exp(Z)


class _Factors(NamedTuple):
    """What a stretch of chunks needs of q, k and g; N = chunks * heads."""

    b: int  # rows of the smallest blocks
    P: Tensor  # (N, C, C) weights inside the chunk, lower triangular, with the scale
    q: Tensor  # (N, C, K) Q', with the scale
    k: Tensor  # (N, C, K) K'
    into: Tensor | None  # (N, C, K) exp(sum of g after m to i), None for b = 1, where it is 1
    levels: list[_Level]  # from the smallest halves to the largest
    top: _Level  # the whole chunk's: the rows that read the state before it and write the state after it
    decay: Tensor  # (N, K) of the state over the chunk


def _halves(x: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """(N, C, K) -> first and second halves of its blocks of 2s rows, both views (N, C / 2s, s, K)."""
    pairs = x.unflatten(1, (-1, 2, s))
    return pairs[:, :, 0], pairs[:, :, 1]


def _pairs(P: Tensor, s: int) -> Tensor:
    """(N, C, C) -> the blocks [second half, first half], a view (N, C / 2s, s, s)."""
    n = P.shape[1] // (2 * s)
    blocks = P.view(-1, n, 2, s, n, 2, s)[:, :, 1, :, :, 0]  # (N, n, s, n, s)
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _diagonal_blocks(P: Tensor, b: int) -> Tensor:
    """(N, C, C) -> its blocks of b rows on the diagonal, a view (N, C / b, b, b)."""
    n = P.shape[1] // b
    return P.view(-1, n, b, n, b).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _times(rows: Tensor, factor: Tensor, b: int) -> Tensor:
    """(..., blocks * b, K) rows times (..., blocks, K) factors."""
    if b == 1:
        return rows * factor
    scaled: Tensor = (rows.unflatten(-2, (-1, b)) * factor.unsqueeze(-2)).flatten(-3, -2)
    return scaled


def _by_block(x: Tensor, b: int) -> Tensor:
    """Sums over the rows of each block, (..., blocks * b, K) -> (..., blocks, K)."""
    return x if b == 1 else x.unflatten(-2, (-1, b)).sum(-2)


def _from_middle(b: int, like: Tensor) -> Tensor:
    """(b, b): M g is the sum of g after the middle row to row i, and minus that after i to the middle before it."""
    m = b // 2
    M = torch.zeros(b, b, dtype=like.dtype, device=like.device)
    M[m:, m:] = torch.ones_like(M[m:, m:]).tril()
    M[:m, :m] = -torch.ones_like(M[:m, :m]).triu(1)
    return M


def _blocks(g: Tensor) -> tuple[int, Tensor, Tensor]:
    """The rows b of the smallest blocks that these gates (N, C, K) allow, and A and Z of them, (N, C / b, K)."""
    for b in BLOCKS:
        if b > g.shape[1] or g.is_meta or torch.compiler.is_compiling():  # there are no numbers to look at
            continue
        A, Z = (half.sum(2) for half in g.unflatten(1, (-1, 2, b // 2)).unbind(2))
        if torch.minimum(A, Z).amin() > -LIMIT:
            return b, A, Z
    return 1, g.clone(), torch.zeros_like(g)


def _factors(q: Tensor, k: Tensor, g: Tensor, scale: float, keep: bool) -> _Factors:
    """Weights and decays of a stretch of chunks, (N, C, K) each; `keep` the levels for a backward."""
    N, C, K = q.shape
    b, A, Z = _blocks(g)
    P, levels = q.new_zeros(N, C, C), []
    into = None
    if b == 1:
        q = q * scale
        P.diagonal(dim1=1, dim2=2).copy_((q * k).sum(-1))
    else:
        into = torch.matmul(_from_middle(b, g), g.view(-1, b, K)).exp_().view_as(g)
        q, k = torch.mul(q, into).mul_(scale), k / into
        _diagonal_blocks(P, b).copy_((q.view(-1, b, K) @ k.view(-1, b, K).mT).tril_().view(N, -1, b, b))
    s = b
    while s < C:
        (A1, A2), (Z1, Z2) = _halves(A, s // b), _halves(Z, s // b)
        level = _level(_halves(q, s)[1], _halves(k, s)[0], A2, Z1, b)
        _pairs(P, s).copy_(level.q @ level.k.mT if s > 1 else (level.q * level.k).sum(-1, keepdim=True))
        if keep:
            levels.append(level)
        first, second = A1[:, :, -1:] + Z1[:, :, -1:], A2[:, :, -1:] + Z2[:, :, -1:]  # sums over the halves
        Z1 += second
        A2 += first
        s *= 2
    decay = (A[:, -1] + Z[:, -1]).exp_()
    return _Factors(b, P, q, k, into, levels, _level(q, k, A, Z, b), decay)


def _level(q: Tensor, k: Tensor, A: Tensor, Z: Tensor, b: int) -> _Level:
    read, write = A.exp(), Z.exp()
    return _Level(_times(q, read, b), _times(k, write, b), read, write)


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
        S = time.order(state).flatten(0, 1).clone()
        segments, starts = time.segments(segment, q.shape[2] * max(q.shape[3], v.shape[3])), []
        for positions in segments:
            starts.append(S.clone())
            q_, k_, v_, g_ = (time.part(x, positions, state.dtype) for x in (q, k, v, g))
            f = _factors(q_, k_, g_, scale, keep=False)
            before = _scan(time.rows(positions, q.shape[2]), f.decay, f.top.k.mT @ v_, S)
            o = (f.P @ v_).baddbmm_(f.top.q, before)
            time.put(out, o.unflatten(0, (-1, q.shape[2])), positions)
        ctx.save_for_backward(q, k, v, g, *starts)
        ctx.scale, ctx.time, ctx.segments = scale, time, segments
        return out, time.unorder(S.unflatten(0, (-1, q.shape[2])))

    @staticmethod
    @first_order("gated_linear_attention")
    def backward(ctx: Any, do: Tensor, dS: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, g, *starts), time = ctx.saved_tensors, ctx.time
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g)]
        dS = time.order(dS).flatten(0, 1).clone()
        for positions, S in zip(reversed(ctx.segments), reversed(starts), strict=True):
            q_, k_, v_, g_, do_ = (time.part(x, positions, dS.dtype) for x in (q, k, v, g, do))
            f = _factors(q_, k_, g_, ctx.scale, keep=True)
            rows = time.rows(positions, q.shape[2])
            before = _scan(rows, f.decay, f.top.k.mT @ v_, S.clone())
            after = _scan(rows[::-1], f.decay, f.top.q.mT @ do_, dS)  # gradients of the states after each chunk
            dP = do_ @ v_.mT
            dv = (f.P.mT @ do_).baddbmm_(f.top.k, after)
            through = f.decay.mul(before.mul(after).sum(-1))
            dq, dk, dg = _factors_backward(f, dP, do_ @ before.mT, v_ @ after.mT, through, q_, k_, ctx.scale)
            for out, y in zip(grads, (dq, dk, dv, dg), strict=True):
                time.put(out, y.unflatten(0, (-1, q.shape[2])), positions)
        return *grads, time.unorder(dS.unflatten(0, (-1, q.shape[2]))), None, None, None


def _factors_backward(
    f: _Factors, dP: Tensor, dq_top: Tensor, dk_top: Tensor, through: Tensor, q: Tensor, k: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and g, from those of the weights, of the rows that meet the states, and of the total decay."""
    b, (N, C, K) = f.b, f.q.shape
    dA, dZ = _by_block(dq_top * f.top.q, b), _by_block(dk_top * f.top.k, b)
    for total in (dA, dZ):
        total[:, -1] += through
    dq_, dk_ = _times(dq_top, f.top.read, b), _times(dk_top, f.top.write, b)  # of Q' and K'
    for level in reversed(f.levels):
        _level_backward(level, dP, dq_, dk_, dA, dZ, b)
    # a token's weight on itself knows no gate: left out of what follows, its part is added at the end
    diagonal = dP.diagonal(dim1=1, dim2=2).unsqueeze(-1) * scale
    if f.into is None:
        return dq_.mul_(scale).addcmul_(diagonal, k), dk_.addcmul_(diagonal, q), dA
    block = _diagonal_blocks(dP, b).reshape(-1, b, b).tril(-1)
    Q, K_ = f.q.view(-1, b, K), f.k.view(-1, b, K)
    dq_.view(-1, b, K).baddbmm_(block, K_)
    dk_.view(-1, b, K).baddbmm_(block.mT, Q)
    dm = (dq_ * f.q).sub_(dk_ * f.k).view(-1, b, K)
    dg = torch.matmul(_from_middle(b, dm).mT, dm).view(N, -1, 2, b // 2, K)
    dg[:, :, 0] += dA.unsqueeze(2)
    dg[:, :, 1] += dZ.unsqueeze(2)
    dq_ = dq_.mul_(f.into).mul_(scale)
    return dq_.addcmul_(diagonal, k), dk_.div_(f.into).addcmul_(diagonal, q), dg.view(N, C, K)


def _level_backward(level: _Level, dP: Tensor, dq: Tensor, dk: Tensor, dA: Tensor, dZ: Tensor, b: int) -> None:
    """Add one level's part to the gradients of Q' and K', and turn dA and dZ of the blocks into those of halves."""
    s = level.q.shape[2]
    (dA1, dA2), (dZ1, dZ2) = _halves(dA, s // b), _halves(dZ, s // b)
    first, second = dA2.sum(2), dZ1.sum(2)  # A2 was raised by the sum over the first half, Z1 by that over the second
    block = _pairs(dP, s).contiguous()
    dq2, dk1 = _product(block, level.k), _product(block.mT, level.q)
    dA2 += _by_block(dq2 * level.q, b)
    dZ1 += _by_block(dk1 * level.k, b)
    _halves(dq, s)[1].add_(_times(dq2, level.read, b))
    _halves(dk, s)[0].add_(_times(dk1, level.write, b))
    for half in (dA1, dZ1):
        half[:, :, -1] += first
    for half in (dA2, dZ2):
        half[:, :, -1] += second


def _product(a: Tensor, x: Tensor) -> Tensor:
    """a @ x for squares a (..., s, s); batched products of the tiniest ones are slower than their sum written out."""
    s = a.shape[-1]
    if s > 2:
        return a @ x
    y = a[..., :1] * x[..., :1, :]
    return y if s == 1 else y.addcmul_(a[..., 1:], x[..., 1:, :])


def _scan(rows: list[slice], decay: Tensor, write: Tensor, S: Tensor) -> Tensor:
    """S -> decay * S + write over the chunks in order; S in place, and the S that each chunk meets returned.

    decay (N, K), write (N, K, V), with N = chunks * heads; S (documents * H, K, V).
    """
    met = torch.empty_like(write)
    decay = decay.unsqueeze(-1)
    for here in rows:
        now = S[: here.stop - here.start]
        met[here] = now
        torch.addcmul(write[here], decay[here], now, out=now)
    return met
