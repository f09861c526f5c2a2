"""Fast torch form: the dual of the recurrence, matrix products inside chunks and one state between them.

With a = dt A, l its running sum inside a chunk, L_ij = exp(l_i - l_j) for i >= j and z = dt x, head by head,

    Y = (L * (C B^T)) z + diag(e^l) C S + D x        S' = e^{l_Q} S + (diag(e^{l_Q - l}) B)^T z

All exponents are <= 0. B and C belong to a group of R heads, so whatever meets the state is one product for the whole
group with the heads' columns side by side, (N, R P). The backward pass is written out.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.core import decay
from zoo.ops.core.autograd import apply
from zoo.ops.core.chunks import ChunkedTime
from zoo.ops.core.differentiation import first_order

CHUNK = 64


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token, T = 1, without the machinery of chunks: what decoding calls."""
    (n, H, N, P), G = state.shape, B.shape[2]
    x1, dt1, B1, C1 = (z[:, 0].to(state.dtype) for z in (x, dt, B, C))
    S = state * (dt1 * A.to(state.dtype)).exp()[..., None, None]
    write = (dt1.unsqueeze(-1) * x1).view(n, G, 1, -1, P).transpose(2, 3)  # (n, G, R, 1, P)
    S = S.view(n, G, -1, N, P).addcmul(B1.view(n, G, 1, N, 1), write)
    y = (C1.view(n, G, 1, 1, N) @ S).view(n, 1, H, P)
    if D is not None:
        y = y + D.to(y.dtype).unsqueeze(-1) * x1.unsqueeze(1)
    return y.to(x.dtype), S.view(n, H, N, P)


def ssd_chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor,
    cuts: tuple[int, ...] | None, size: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The whole sequence in chunks of `size` tokens (CHUNK when None, less for short documents); T >= 1."""
    lengths = [x.shape[1]] if cuts is None else [right - left for left, right in itertools.pairwise(cuts)]
    size = size or min(CHUNK, 1 << max(0, max(lengths) - 1).bit_length())
    result: tuple[Tensor, Tensor] = apply(_Chunked, x, dt, A, B, C, D, state, cuts, size)
    return result


class _Decays(NamedTuple):
    """Of all chunks; N0 = chunks * groups."""

    inside: Tensor  # (N0, R, Q, Q) L
    before: Tensor  # (N0, Q, R, 1) e^l
    after: Tensor  # (N0, Q, R, 1) e^{l_Q - l}
    total: Tensor  # (N0, 1, R, 1) e^{l_Q}


def _decays(a: Tensor) -> _Decays:
    """Of the log decays of all chunks, (N0, Q, R)."""
    sums = decay.sums(a.mT)  # (N0, R, Q)
    end = sums[..., -1:]
    before, after, total = (e.exp().to(a.dtype).mT.unsqueeze(-1) for e in (sums, end - sums, end))
    return _Decays(decay.between(sums, a.dtype), before, after, total)


def _heads_first(z: Tensor) -> Tensor:
    """(N0, Q, R, P) -> (N0 * R, Q, P)."""
    N0, Q, R, P = z.shape
    return z.transpose(1, 2).reshape(N0 * R, Q, P)


def _grouped(S: Tensor, G: int) -> Tensor:
    """States (n, H, N, P) -> (n * G, N, R * P), the heads of a group side by side."""
    n, H, N, P = S.shape
    return S.reshape(n * G, H // G, N, P).transpose(1, 2).reshape(n * G, N, -1)


def _ungrouped(S: Tensor, n: int, P: int) -> Tensor:
    """The inverse of `_grouped`."""
    states: Tensor = S.unflatten(2, (-1, P)).transpose(1, 2).reshape(n, -1, S.shape[1], P)
    return states


class _Chunked(torch.autograd.Function):
    """The whole recurrence as one node. Saved: the inputs in the layout of chunks, and the state before each chunk."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor,
        cuts: tuple[int, ...] | None, size: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        (batch, T, H, P), (G, N), dtype = x.shape, B.shape[2:], state.dtype
        R, dtypes = H // G, tuple(None if z is None else z.dtype for z in (x, dt, A, B, C, D))
        time = ChunkedTime(batch, T, size, cuts, x.device)
        x = time.split(x.reshape(batch, T, G, R * P).to(dtype)).view(time.n_chunks * G, size, R, P)
        dt = time.split(dt.reshape(batch, T, G, R).to(dtype)).flatten(0, 1)  # (N0, Q, R)
        B, C = (time.split(z.to(dtype)).flatten(0, 1) for z in (B, C))  # (N0, Q, N)
        A = A.to(dtype)
        d = _decays(_by_head(dt, A, G))
        z = dt.unsqueeze(-1) * x
        weights = d.inside.mul_(torch.bmm(C, B.mT).unsqueeze(1)).flatten(0, 1)
        y = torch.bmm(weights, _heads_first(z)).view_as(z.transpose(1, 2)).transpose(1, 2)  # (N0, Q, R, P)
        write = torch.bmm(B.mT, z.mul_(d.after).flatten(2))  # (N0, N, R P)
        before = torch.empty_like(write)
        S = _grouped(time.order(state), G).clone()
        for start, stop in time.steps:
            rows, running = slice(start * G, stop * G), S[: (stop - start) * G]
            before[rows] = running
            running.unflatten(2, (R, P)).mul_(d.total[rows])
            running += write[rows]
        y = torch.bmm(C, before).unflatten(2, (R, P)).mul_(d.before).add_(y)
        if D is not None:
            _add_input(y, x, D.to(dtype), G)
        ctx.save_for_backward(x, dt, A, B, C, D, before)
        ctx.time, ctx.dtypes, ctx.sizes = time, dtypes, (batch, T, G, R, N, P)
        y = time.merge(y.flatten(2).unflatten(0, (time.n_chunks, G))).reshape(batch, T, H, P)
        return y.to(dtypes[0]), time.unorder(_ungrouped(S, time.n_documents, P))

    @staticmethod
    @first_order("ssd")
    def backward(ctx: Any, dy: Tensor, dS: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, before = ctx.saved_tensors
        time, (batch, T, G, R, _N, P) = ctx.time, ctx.sizes
        _Q, dtype = time.size, A.dtype
        d = _decays(_by_head(dt, A, G))
        z = dt.unsqueeze(-1) * x
        dy = time.split(dy.reshape(batch, T, G, R * P).to(dtype)).view_as(x)

        # against time: the gradient of the state after each chunk
        dread = d.before * dy  # (N0, Q, R, P) of C S
        asked = torch.bmm(C.mT, dread.flatten(2))  # (N0, N, R P)
        after = torch.empty_like(before)
        running = _grouped(time.order(dS), G).clone()
        for start, stop in reversed(time.steps):
            rows = slice(start * G, stop * G)
            now = running[: (stop - start) * G]
            after[rows] = now
            now.unflatten(2, (R, P)).mul_(d.total[rows])
            now += asked[rows]

        # all chunks at once
        dy_heads = _heads_first(dy)
        dweights = torch.bmm(dy_heads, _heads_first(z).mT).view_as(d.inside)
        products = torch.bmm(C, B.mT).unsqueeze(1)  # (N0, 1, Q, Q)
        weights = d.inside * products
        dproducts = (dweights * d.inside).sum(1)
        pairs = dweights.mul_(weights).tril_(-1)  # of l_i - l_j
        ends = (dread * torch.bmm(C, before).unflatten(2, (R, P))).sum(-1)  # of l_i, a summed up to i
        given = torch.bmm(B, after).unflatten(2, (R, P)).mul_(d.after)  # of z, through the state
        starts = (given * z).sum(-1)  # of l_Q - l_j, a summed after j
        dz = torch.bmm(weights.flatten(0, 1).mT, dy_heads).view_as(z.transpose(1, 2)).transpose(1, 2) + given
        dC = torch.bmm(dproducts, B).baddbmm_(dread.flatten(2), before.mT)
        dB = torch.bmm(dproducts.mT, C).baddbmm_(z.mul_(d.after).flatten(2), after.mT)
        through = (before * after).unflatten(2, (R, P)).sum((1, 3)).unsqueeze(1) * d.total[..., 0]
        da = decay.sum_from(ends) + decay.sum_before(starts) + through + decay.across(pairs).mT  # (N0, Q, R)

        ddt = (dz * x).sum(-1) + _by_head(da, A, G)
        dA = _of_heads(da * dt, G)
        dx = dz.mul_(dt.unsqueeze(-1))
        dD = None
        if D is not None:
            dD = _of_heads((dy * x).sum(-1), G)
            _add_input(dx, dy, D, G)
        dx, ddt, dB, dC = (time.merge(g.flatten(2).unflatten(0, (time.n_chunks, G))) for g in (dx, ddt, dB, dC))
        exact = (dx.reshape(batch, T, G * R, P), ddt.reshape(batch, T, G * R), dA, dB, dC, dD)
        grads = tuple(None if g is None else g.to(like) for g, like in zip(exact, ctx.dtypes, strict=True))
        return *grads, time.unorder(_ungrouped(running, time.n_documents, P)), None, None


def _by_head(x: Tensor, A: Tensor, G: int) -> Tensor:
    """(N0, Q, R) times the number of each head."""
    scaled: Tensor = (x.unflatten(0, (len(x) // G, G)) * A.view(G, 1, -1)).flatten(0, 1)
    return scaled


def _of_heads(x: Tensor, G: int) -> Tensor:
    """(N0, Q, R) -> (H,), summed over chunks and steps."""
    sums: Tensor = x.unflatten(0, (len(x) // G, G)).sum((0, 2)).flatten()
    return sums


def _add_input(y: Tensor, x: Tensor, D: Tensor, G: int) -> None:
    """y += D x in place, (N0, Q, R, P)."""
    chunks = (len(x) // G, G)
    y.unflatten(0, chunks).addcmul_(x.unflatten(0, chunks), D.view(G, 1, -1, 1))
