"""Fast torch form: a few steps of time at a time, in buffers that stay in the cache, and a backward in closed form.

The states of a chunk, (C, R, N, E) with the channels innermost, are the only place where time, state size and channels
meet. Everything in a chunk that needs no past is one call for all its steps: the decays exp(delta A), the inputs
delta u B^T, and afterwards y = C^T h. Between them each step is one multiply-add in place. The backward computes the
chunk again from the state before it, and walks back with

    G_t = dy_t C_t^T + a_{t+1} G_{t+1},   a_t = exp(delta_t A),   w_t = G_t a_t h_{t-1}   (the gradient of delta_t A),

from which dC_t = sum_e dy h, dB_t = sum_e G delta u, d(delta u) = sum_n G B, dA = sum_t w delta, and sum_n w A is the
part of ddelta that does not come through delta u.
"""

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.core.autograd import apply
from zoo.ops.core.differentiation import first_order

# exp(x) as exp2(x / ln 2): torch's exp2 takes 0.71 ns a number on a CPU with AVX2, its exp 1.33 ns (a product 0.17)
_LOG2_E = math.log2(math.e)
# Numbers in a chunk and in a step. CPU time of forward / forward + backward, float32, one EPYC core (512 KiB of L2
# cache): B=1 T=1024 E=1536 N=16 (mamba-130m; its projections' matrix products take 114 ms forward) 103/261, 58/205,
# 43/181, 52/213, 54/226 ms at chunks of 4, 8, 16, 32, 64; B=8 T=256 E=256 N=16 in steps of 1, 2, 4, 8 rows (2**12 ...
# 2**15 numbers) 41/142, 26/140, 27/80, 19/65 ms at chunks of 16, and 19/65, 19/77, 21/88 at 16, 32, 64 of 8 rows.
CHUNK_NUMBERS = 2**18
STEP_NUMBERS = 2**15
CHUNK_MIN, CHUNK_MAX = 16, 64


def selective_scan_step(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token, T = 1, without the machinery of chunks: what decoding calls."""
    dtype, given = state.dtype, u.dtype
    if given != dtype or delta.dtype != dtype:
        u, delta, B, C = (x.to(dtype) for x in (u, delta, B, C))
    a = ((A if A.dtype == dtype else A.to(dtype)) * delta.mT).exp_()  # (B, E, N)
    written = (delta * u).mT  # (B, E, 1)
    # without autograd nothing else needs `a`, and fresh arrays cost more than the arithmetic
    keep = torch.is_grad_enabled()
    h = torch.addcmul(written * B, a, state) if keep else a.mul_(state).addcmul_(written, B)
    y = C @ h.mT  # (B, 1, E)
    if D is not None:
        y = torch.addcmul(y, D if D.dtype == dtype else D.to(dtype), u)
    return y if given == dtype else y.to(given), h


def selective_scan_chunked(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor,
    cuts: tuple[int, ...] | None,
    *,
    chunk: int | None = None,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence over all documents at once, computed in the dtype of `state`.

    Args:
        chunk: steps per chunk; chosen by size when omitted.
        rows: sequences of a batch that are walked together; chosen by size when omitted.
    """
    (batch, T, E), N = u.shape, B.shape[2]
    if rows is None:
        rows = max(1, min(batch, STEP_NUMBERS // max(1, N * E)))
    if chunk is None:
        chunk = min(CHUNK_MAX, max(CHUNK_MIN, CHUNK_NUMBERS // max(1, rows * N * E)))
    given = (u, delta, A, B, C, D, state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    result: tuple[Tensor, Tensor] = apply(_Chunked, *given, cuts, max(1, min(chunk, T)), rows, keep)
    return result


class _Rows(NamedTuple):
    """Sequences that are walked together, time first; several documents in a single row."""

    time: tuple[Tensor, ...]  # u, delta, B, C (T, R, E or N): views
    states: list[Tensor]  # of each document, (R, N, E)
    starts: dict[int, int]  # step -> the document that begins there
    ends: dict[int, int]  # step -> the document whose last step it is

    def chunk(self, left: int, right: int) -> tuple[Tensor, ...]:
        """u, delta, B, C of the steps [left, right), in the dtype of the state."""
        dtype = self.states[0].dtype
        return tuple(_dense(x[left:right], dtype) for x in self.time)


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A chunk as the products want it. Copied chunk by chunk it stays in the cache, of the whole length it does not."""
    return x.to(dtype).contiguous()


def _rows(
    u: Tensor, delta: Tensor, B: Tensor, C: Tensor, state: Tensor, cuts: tuple[int, ...] | None, at: slice
) -> _Rows:
    T, states = u.shape[1], state.mT.contiguous()  # (R, N, E) or (n, N, E)
    time = tuple(x[at].transpose(0, 1) for x in (u, delta, B, C))
    if cuts is None:
        return _Rows(time, [states[at]], {0: 0}, {T - 1: 0})
    filled = [(i, left, right) for i, (left, right) in enumerate(itertools.pairwise(cuts)) if left < right]
    starts, ends = {left: i for i, left, _ in filled}, {right - 1: i for i, _, right in filled}
    return _Rows(time, [*states.split(1)], starts, ends)


class _Buffers(NamedTuple):
    """Where a chunk is computed; `h[i]` is the state before step i."""

    a: Tensor  # (C, R, N, E)
    h: Tensor  # (C + 1, R, N, E)

    @classmethod
    def like(cls, states: Tensor, chunk: int) -> "_Buffers":
        return cls(states.new_empty(chunk, *states.shape), states.new_empty(chunk + 1, *states.shape))


def _outer(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """(C, R, E) and (C, R, N) -> (C, R, N, E)."""
    return torch.mul(x.unsqueeze(2), y.unsqueeze(3), out=out)


def _inner(x: Tensor, h: Tensor) -> Tensor:
    """(C, R, N) and (C, R, N, E) -> (C, R, E), the sum over N."""
    return torch.bmm(x.flatten(0, 1).unsqueeze(1), h.flatten(0, 1)).view(*h.shape[:2], h.shape[3])


def _over_channels(x: Tensor, h: Tensor) -> Tensor:
    """(C, R, E) and (C, R, N, E) -> (R, C, N), the sum over E. With h on the left it costs 12 times."""
    return torch.bmm(x.flatten(0, 1).unsqueeze(1), h.flatten(0, 1).mT).view(*h.shape[:3]).transpose(0, 1)


def _states(
    rows: _Rows, du: Tensor, delta: Tensor, B: Tensor, A2: Tensor, buffers: _Buffers, left: int, right: int
) -> None:
    """Fill a with the decays of the steps [left, right) and h[1:] with the states after them; du = delta u."""
    a, h = buffers.a[: right - left], buffers.h[1 : right - left + 1]
    torch.mul(delta.unsqueeze(2), A2, out=a)
    a.exp2_()
    _outer(du, B, h)
    before = buffers.h[0]
    for t, a_t, h_t in zip(range(left, right), a.unbind(0), h.unbind(0), strict=True):
        if t in rows.starts:
            before = rows.states[rows.starts[t]]
        before = h_t.addcmul_(a_t, before)


class _Chunked(torch.autograd.Function):
    """The whole recurrence as one node. Saved for the backward: the inputs, and the states where chunks begin."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        state: Tensor,
        cuts: tuple[int, ...] | None,
        chunk: int,
        block: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        (batch, T, E), N = u.shape, B.shape[2]
        y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        last = state.mT.clone(memory_format=torch.contiguous_format)  # empty documents hand their states through
        # fresh memory is dear: without a backward the states between chunks are not kept
        saved = state.new_empty(-(-T // chunk) if keep else 0, batch, N, E)
        A2 = (A.to(state.dtype) * _LOG2_E).mT.contiguous()  # (N, E)
        D_ = None if D is None else D.to(state.dtype)
        for at in _blocks(batch, block):
            rows, y_ = _rows(u, delta, B, C, state, cuts, at), y[at].transpose(0, 1)
            buffers = _Buffers.like(last[at] if cuts is None else last[:1], chunk)
            buffers.h[0].zero_()
            for k, left in enumerate(range(0, T, chunk)):
                right = min(left + chunk, T)
                u_, d, B_, C_ = rows.chunk(left, right)
                if keep:
                    saved[k, at] = buffers.h[0]
                _states(rows, d * u_, d, B_, A2, buffers, left, right)
                h = buffers.h[1 : right - left + 1]
                out = _inner(C_, h)
                y_[left:right] = out if D_ is None else out.addcmul_(u_, D_)
                for t in range(left, right):
                    if t in rows.ends:
                        (last[at] if cuts is None else last[rows.ends[t]]).copy_(
                            h[t - left] if cuts is None else h[t - left, 0]
                        )
                buffers.h[0].copy_(h[-1])
        ctx.save_for_backward(u, delta, A, B, C, D, state, saved)
        ctx.cuts, ctx.chunk, ctx.block = cuts, chunk, block
        return y, last.mT.contiguous()

    @staticmethod
    @first_order("selective_scan")
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, state, saved = ctx.saved_tensors
        cuts, chunk, dtype = ctx.cuts, ctx.chunk, state.dtype
        batch, T, _ = u.shape
        At = A.to(dtype).mT.contiguous()
        A2, dA = At * _LOG2_E, torch.zeros_like(At)
        du, ddelta, dB, dC = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (u, delta, B, C))
        D_, dD = (None, None) if D is None else (D.to(dtype), torch.zeros_like(D, dtype=dtype))
        dlast_ = dlast.mT
        dstate = dlast_.clone(memory_format=torch.contiguous_format)
        for at in _blocks(batch, ctx.block):
            rows, dy_t = _rows(u, delta, B, C, state, cuts, at), dy[at].transpose(0, 1)
            carry = torch.zeros_like(rows.states[0])  # what reaches the step at hand from after it
            buffers = _Buffers.like(carry, chunk)
            G_, w_ = (torch.empty_like(buffers.a) for _ in range(2))
            dA_ = torch.zeros_like(carry)
            for k in reversed(range(len(saved))):
                left, right = k * chunk, min((k + 1) * chunk, T)
                n, now = right - left, (at, slice(left, right))
                a, h, G, w = buffers.a[:n], buffers.h[: n + 1], G_[:n], w_[:n]
                u_, d, B_, C_ = rows.chunk(left, right)
                dy_ = _dense(dy_t[left:right], dtype)
                x = d * u_
                h[0].copy_(saved[k, at])
                _states(rows, x, d, B_, A2, buffers, left, right)
                _outer(dy_, C_, G)
                for i in range(n - 1, -1, -1):
                    if left + i in rows.ends:
                        G[i].add_(dlast_[at] if cuts is None else dlast_[rows.ends[left + i]])
                    elif i == n - 1:
                        G[i].add_(carry)
                    else:
                        G[i].addcmul_(a[i + 1], G[i + 1])
                dC[now] = _over_channels(dy_, h[1:]).to(dC.dtype)
                dB[now] = _over_channels(x, G).to(dB.dtype)
                dx = _inner(B_, G)
                a.mul_(G)
                carry.copy_(a[0])
                torch.mul(a, h[:-1], out=w)
                for t in range(left, right):
                    if t in rows.starts:
                        document = rows.starts[t]
                        torch.mul(a[t - left], rows.states[document], out=w[t - left])
                        dstate[at if cuts is None else slice(document, document + 1)] = a[t - left]
                dA_ += torch.mul(w, d.unsqueeze(2), out=a).sum(0)
                dd = w.mul_(At).sum(2)
                ddelta[now] = dd.addcmul_(dx, u_).transpose(0, 1)
                dx.mul_(d)
                if D_ is not None and dD is not None:
                    dx.addcmul_(dy_, D_)
                    dD += dy_.mul(u_).sum((0, 1))
                du[now] = dx.transpose(0, 1)
            dA += dA_.sum(0)
        dD = None if D is None or dD is None else dD.to(D.dtype)
        return du, ddelta, dA.mT.to(A.dtype), dB, dC, dD, dstate.mT.contiguous(), None, None, None, None


def _blocks(batch: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, batch)) for i in range(0, batch, size)]
