"""Fast torch form: chunks of time as masked matrix products, with a backward that divides by nothing.

Inside a chunk of C tokens the weight of token j for a later token i is M_i W[i, j] S_j, with

    W[i, j] = T_{j+1} T_{j+2} ... T_{i-1}    for j < i, and 0 elsewhere.

The state that enters is one more node in front of the chunk, and the state that leaves one more behind it. So W of
C + 2 nodes holds the factor of the entering state for each token (its first column), of each token for the leaving
state (its last row), and the product of the whole chunk (their corner).

Transitions may be negative or 0, and so no logarithm of them is taken. A product loses one factor T_t in its
derivative. What is left is W[i, t] W[t, j], two entries of W itself:

    dT_t = sum over i > t > j of dW[i, j] W[i, t] W[t, j] = sum over i of W[i, t] (dW W^T)[i, t].
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.core.autograd import apply
from zoo.ops.core.chunks import ChunkedTime
from zoo.ops.core.differentiation import first_order

# CPU time of forward + backward, float32, B=1 T=2048 H=4 K=V=64, one core of a busy machine: chunks of 32 / 64 / 128
# take 142 / 165 / 203 ms; the loop takes 4.1 s.
CHUNK = 32
SEGMENT = 2**19


def plstm_step(
    q: Tensor, k: Tensor, v: Tensor, source: Tensor, transition: Tensor, mark: Tensor, direct: Tensor, state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token, T = 1, without the machinery of chunks: what decoding calls."""
    q1, k1, v1, S, T, M, D = (x[:, 0].to(state.dtype) for x in (q, k, v, source, transition, mark, direct))
    q1 = q1 * scale
    own = (D * (q1 * k1).sum(-1)).unsqueeze(-1) * v1  # (B, H, V)
    o = torch.addcmul(own, M.unsqueeze(-1), (q1.unsqueeze(-2) @ state).squeeze(-2))
    C = torch.addcmul((S.unsqueeze(-1) * k1).unsqueeze(-1) * v1.unsqueeze(-2), T[..., None, None], state)
    return o.unsqueeze(1).to(v.dtype), C


def plstm_chunked(
    q: Tensor, k: Tensor, v: Tensor, source: Tensor, transition: Tensor, mark: Tensor, direct: Tensor, state: Tensor,
    scale: float, cuts: tuple[int, ...] | None, *, chunk: int = CHUNK, segment: int = SEGMENT,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence over all documents at once, computed in the dtype of `state`.

    Args:
        chunk: tokens per chunk.
        segment: about how many numbers of one of q, k, v are worked on at a time; bounds the temporary memory.
    """
    B, T = q.shape[:2]
    longest = T if cuts is None else max(right - left for left, right in itertools.pairwise(cuts))
    time = ChunkedTime(B, T, min(chunk, max(1, longest)), cuts, q.device)
    inputs = (q, k, v, source, transition, mark, direct)
    result: tuple[Tensor, Tensor] = apply(_Chunked, *inputs, state, scale, time, segment)
    return result


def between(transition: Tensor) -> Tensor:
    """(N, C) -> W of C + 2 nodes, (N, C + 2, C + 2): products of the transitions that lie between two nodes."""
    padded = F.pad(transition, (2, 0), value=1.0)  # row i multiplies by the transition of node i - 1
    node = torch.arange(padded.shape[1], device=transition.device)
    passes = node[:, None] - 1 > node
    return torch.where(passes, padded.unsqueeze(-1), padded.new_ones(())).cumprod(1).tril_(-1)


class _Factors(NamedTuple):
    """What a stretch of chunks needs of q, k and gates; N = chunks * heads."""

    W: Tensor  # (N, C + 2, C + 2)
    scores: Tensor  # (N, C, C) scale q_i . k_j
    gates: Tensor  # (N, C, C) of pairs: M_i W_ij S_j below the diagonal, D on it
    enter: Tensor  # (N, C) factor of the entering state for each token, with the scale
    leave: Tensor  # (N, C) factor of each token for the leaving state
    total: Tensor  # (N, 1, 1) factor of the entering state for the leaving one


def _factors(q: Tensor, k: Tensor, S: Tensor, T: Tensor, M: Tensor, D: Tensor, *, scale: float) -> _Factors:
    W = between(T)
    gates = (W[:, 1:-1, 1:-1] * M.unsqueeze(-1)).mul_(S.unsqueeze(-2))
    gates.diagonal(dim1=1, dim2=2).copy_(D)
    enter, leave = W[:, 1:-1, 0] * M * scale, W[:, -1, 1:-1] * S
    return _Factors(W, (q @ k.mT).mul_(scale), gates, enter, leave, W[:, -1:, :1])


class _Chunked(torch.autograd.Function):
    """The whole recurrence as one node. Saved for the backward: the inputs, and the states where segments begin."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, S: Tensor, T: Tensor, M: Tensor, D: Tensor, state: Tensor,
        scale: float, time: ChunkedTime, segment: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        heads = q.shape[2]
        C = time.order(state).flatten(0, 1).clone()
        segments, starts = time.segments(segment, heads * max(q.shape[3], v.shape[3], time.size)), []
        for positions in segments:
            starts.append(C.clone())
            q_, k_, v_, gates = _parts(time, positions, (q, k, v), (S, T, M, D), state.dtype)
            f = _factors(q_, k_, *gates, scale=scale)
            write = (k_ * f.leave.unsqueeze(-1)).mT @ v_
            before = _scan(time.rows(positions, heads), f.total, write, C)
            o = ((f.gates * f.scores) @ v_).baddbmm_(q_ * f.enter.unsqueeze(-1), before)
            time.put(out, o.unflatten(0, (-1, heads)), positions)
        ctx.save_for_backward(q, k, v, S, T, M, D, *starts)
        ctx.scale, ctx.time, ctx.segments = scale, time, segments
        return out, time.unorder(C.unflatten(0, (-1, heads)))

    @staticmethod
    @first_order("plstm")
    def backward(ctx: Any, do: Tensor, dC: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, S, T, M, D, *starts), time = ctx.saved_tensors, ctx.time
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, S, T, M, D)]
        heads = q.shape[2]
        dC = time.order(dC).flatten(0, 1).clone()
        for positions, C in zip(reversed(ctx.segments), reversed(starts), strict=True):
            q_, k_, v_, gates = _parts(time, positions, (q, k, v), (S, T, M, D), dC.dtype)
            do_ = time.part(do, positions, dC.dtype)
            f = _factors(q_, k_, *gates, scale=ctx.scale)
            read, write = q_ * f.enter.unsqueeze(-1), k_ * f.leave.unsqueeze(-1)
            rows = time.rows(positions, heads)
            before = _scan(rows, f.total, write.mT @ v_, C.clone())
            after = _scan(rows[::-1], f.total, read.mT @ do_, dC)  # gradients of the states after each chunk
            dv = ((f.gates * f.scores).mT @ do_).baddbmm_(write, after)
            through = (before * after).sum((1, 2))
            own = _factors_backward(
                f, do_ @ v_.mT, do_ @ before.mT, v_ @ after.mT, through, q_, k_, gates, ctx.scale
            )  # fmt: skip
            for out, y in zip(grads, (own[0], own[1], dv, *own[2:]), strict=True):
                time.put(out, y.unflatten(0, (-1, heads)), positions)
        return *grads, time.unorder(dC.unflatten(0, (-1, heads))), None, None, None


def _parts(
    time: ChunkedTime, positions: tuple[int, int], rows: tuple[Tensor, ...], gates: tuple[Tensor, ...],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Chunks of q, k, v, and of the gates; a token that is missing writes nothing and keeps the state."""
    q, k, v = (time.part(x, positions, dtype) for x in rows)
    S, T, M, D = (time.part(x, positions, dtype) for x in gates)
    there = time.part(torch.ones_like(gates[1]), positions, dtype)
    return q, k, v, (S, T.masked_fill(there == 0, 1), M, D)


def _factors_backward(
    f: _Factors, dP: Tensor, dread: Tensor, dwrite: Tensor, through: Tensor, q: Tensor, k: Tensor,
    gates: tuple[Tensor, ...], scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, S, T, M, D from those of the weights, of the rows that meet states, and of the total."""
    S, _, M, _ = gates
    dscores, dgates = (dP * f.gates).mul_(scale), dP * f.scores
    dq = torch.addcmul(dscores @ k, dread, f.enter.unsqueeze(-1))
    dk = torch.addcmul(dscores.mT @ q, dwrite, f.leave.unsqueeze(-1))
    denter, dleave = (dread * q).sum(-1) * scale, (dwrite * k).sum(-1)
    inner = f.W[:, 1:-1, 1:-1]
    weighted = dgates * inner
    dM = torch.addcmul((weighted @ S.unsqueeze(-1)).squeeze(-1), denter, f.W[:, 1:-1, 0])
    dS = torch.addcmul((weighted.mT @ M.unsqueeze(-1)).squeeze(-1), dleave, f.W[:, -1, 1:-1])
    dD = dgates.diagonal(dim1=1, dim2=2).clone()
    dW = torch.zeros_like(f.W)
    dW[:, 1:-1, 1:-1] = dgates.mul_(M.unsqueeze(-1)).mul_(S.unsqueeze(-2)).tril_(-1)
    dW[:, 1:-1, 0], dW[:, -1, 1:-1], dW[:, -1, 0] = denter * M, dleave * S, through
    dT = (f.W * (dW @ f.W.mT)).sum(1)[:, 1:-1]
    return dq, dk, dS, dT, dM, dD


def _scan(rows: list[slice], total: Tensor, write: Tensor, C: Tensor) -> Tensor:
    """C -> total * C + write over the chunks in order; C in place, and the C that each chunk meets returned.

    total (N, 1, 1), write (N, K, V), with N = chunks * heads; C (documents * H, K, V).
    """
    met = torch.empty_like(write)
    for here in rows:
        now = C[: here.stop - here.start]
        met[here] = now
        torch.addcmul(write[here], total[here], now, out=now)
    return met
