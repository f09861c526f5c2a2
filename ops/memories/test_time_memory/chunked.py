"""Fast form: chunk after chunk by the dual form, in which no gradient of one token is ever formed.

All gradients of a chunk are taken at the weights W at its beginning, and each is of rank one: e_i h_i^T for the matrix
that sees h_i. With the decays g summed up inside the chunk, l_t = g_1 + ... + g_t, the accumulator behind token t is

    A_t = exp(l_t) A - sum_{i <= t} G[t, i] e_i h_i^T,    G[t, i] = exp(l_t - l_i) eta_i,

so what a query meets at matrix l is a product with the matrix at the beginning, less one masked attention:

    A_t x_t = exp(l_t) A x_t - sum_{i <= t} G[t, i] (h_i . x_t) e_i.

With momentum G is the product of the two triangles of decays, and the running sum S at the beginning adds a term. The
chunk's end is one product, A <- exp(l_C) A - E^T diag(G[C]) H. Everything is plain torch: autograd goes through the
inner gradients, so that the outer ones are exact.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops.core import decay
from zoo.ops.memories.test_time_memory.chunk_slots import ChunkSlots
from zoo.ops.memories.test_time_memory.memory import Apply, Factors, Norm
from zoo.ops.memories.test_time_memory.reference import Tokens
from zoo.ops.memories.test_time_memory.rule import MemoryRule
from zoo.ops.memories.test_time_memory.state import MemoryState


class Coefficients(NamedTuple):
    """What tokens of N chunks weigh in the accumulators behind each of R tokens: all C of them, or the last one.

    start: (N, R, 1) the accumulator at the beginning; sums: the same of the running sum there, None without momentum;
    gradients: (N, R, C) the gradient of token i, 0 for i > t; on_keys: the same times the key of i and the query of t,
    None where queries do not read the chunk's own tokens. last_sums, last_gradients: (N, 1, 1) and (N, C, 1), the
    running sum behind the chunk, from the one before it and from gradients.
    """

    start: Tensor
    sums: Tensor | None
    gradients: Tensor
    on_keys: Tensor | None
    last_sums: Tensor | None
    last_gradients: Tensor | None

    def split(self, sizes: list[int]) -> "list[Coefficients]":
        """Those of so many chunks each; cut at once, for the gradient of a slice is as large as the whole."""
        none = [None] * len(sizes)
        fields = (none if x is None else x.split(sizes) for x in self)
        return [Coefficients(*each) for each in zip(*fields, strict=True)]


def coefficients(eta: Tensor, g: Tensor, theta: Tensor | None, *, last: bool) -> Coefficients:
    """From gates (N, C): steps, log decays of the accumulator and of the running sum; `last`: of the last token alone.

    In float64: the gradient of a gate is a difference of sums over rows and columns, which nearly cancel where gates
    shut. Measured in float32, gates at exp(-8): 9e-5 of the gradient of g were lost, and are 1e-7 now.
    """
    l = decay.sums(g)
    between = (l[:, -1:] - l).exp().unsqueeze(1) if last else decay.between(l, torch.float64)
    start = (l[:, -1:] if last else l).exp().unsqueeze(-1)
    if theta is None:
        return Coefficients(start.to(eta.dtype), None, between.to(eta.dtype) * eta.unsqueeze(-2), None, None, None)
    m = decay.sums(theta)
    inner, begun = decay.between(m, torch.float64), m.exp().unsqueeze(-1)
    start, sums, weighed = (x.to(eta.dtype) for x in (start, between @ begun, between @ inner))
    eta_ = eta.unsqueeze(-2)
    last_gradients = (inner[:, -1:].to(eta.dtype) * eta_).mT
    return Coefficients(start, sums, weighed * eta_, None, begun[:, -1:].to(eta.dtype), last_gradients)


def memory_chunked(
    rule: MemoryRule, tokens: Tokens, norm: Norm, state: MemoryState, cuts: tuple[int, ...] | None, begun: bool
) -> tuple[Tensor, MemoryState]:
    """T at least 1; `begun`: the state comes from a call, so that chunks may hold tokens already."""
    q, k, v, gates = tokens
    (B, T, H, K), V = k.shape, v.shape[-1]
    slots = ChunkSlots(B, T, rule.chunk_size, cuts, state.filled if begun else None, q.device)
    before = torch.cat([state.chunk, state.chunk.new_zeros(*state.chunk.shape[:3], K)], dim=-1)
    laid, opened = slots.lay(torch.cat([k, v, torch.stack(gates, dim=-1), q], dim=-1), before)
    k, v, each, q = laid.flatten(0, 1).split([K, V, len(gates), K], dim=-1)  # (G * H, C, .)
    gate = dict(zip(rule.gates, each.unbind(-1), strict=True))
    weigh = coefficients(gate["eta"], gate["g"], gate.get("theta"), last=rule.reads == "chunk")
    if rule.reads == "token":
        weigh = weigh._replace(on_keys=weigh.gradients * (rule.memory.seen(q) @ rule.memory.seen(k).mT))
    delta = gate["delta"].unsqueeze(-1) if "delta" in gate else None
    if delta is not None:  # in free slots it is 0, where the root of its square has no slope
        delta = delta.masked_fill(delta == 0, 1)
    order = slots.tables.order
    A, S = ([x[order].flatten(0, 1) for x in kept] for kept in (state.weights, state.momentum))
    ended: list[list[Tensor]] = []  # accumulators of documents that end, shortest first
    ys: list[Tensor] = []
    rows = [(stop - start) * H for start, stop in slots.steps]
    cut = [x.split(rows) for x in (q, k, v)]
    deltas = [None] * len(rows) if delta is None else delta.split(rows)
    for q_, k_, v_, delta_, weighed, full in zip(*cut, deltas, weigh.split(rows), slots.full, strict=True):
        running = len(q_)
        if not ys or running < len(A[0]):
            ended.append([x[running:] for x in (*A, *S)])
            A, S = [x[:running] for x in A], [x[:running] for x in S]
            own = _repeated(norm, running // H)
        chunk = _Chunk(rule, weighed, own, A, S)
        chunk.see(k_, v_, delta_, ends=full is not False)
        ys.append(chunk.read(q_))
        A, S = chunk.after(full if isinstance(full, bool) else full.repeat_interleave(H).view(-1, 1, 1))
    ended.append([*A, *S])
    last = [torch.cat(parts[::-1]).unflatten(0, (-1, H))[slots.tables.rank] for parts in zip(*ended, strict=True)]
    chunk_after = opened[..., : K + V + len(gates)]
    n = len(state.weights)
    after = MemoryState(tuple(last[:n]), tuple(last[n:]), chunk_after.contiguous(), slots.filled)
    return slots.back(torch.cat(ys).unflatten(0, (-1, H))), after


def _repeated(norm: Norm, documents: int) -> Norm:
    """Gain and offset (H, V) as (documents * H, 1, V)."""
    return Norm(*(None if x is None else x.repeat(documents, 1).unsqueeze(1) for x in norm))


class _Chunk:
    """One chunk of N rows: accumulators A and running sums S at its beginning, and what its tokens make of them."""

    def __init__(self, rule: MemoryRule, weigh: Coefficients, norm: Norm, A: Sequence[Tensor], S: Sequence[Tensor]):
        self.rule, self.weigh, self.norm, self.A, self.S = rule, weigh, norm, A, S
        self.factors: list[Factors] = []
        self.scales: list[Tensor | None] = [None] * len(A)
        if rule.retention.linear:
            self.scales = [rule.retention.factor(x) for x in A]
            self.W = [x if f is None else f * x for f, x in zip(self.scales, A, strict=True)]
        else:
            self.W = [rule.retention.weights(x) for x in A]

    def see(self, k: Tensor, v: Tensor, delta: Tensor | None, *, ends: bool) -> None:
        """The gradients of the chunk's tokens, unless nothing reads them."""
        if self.rule.reads == "chunk" and not ends:
            return
        memory, loss = self.rule.memory, self.rule.loss

        def pull(o: Tensor) -> Tensor:
            return memory.pulled(o, k, self.norm, lambda y: loss.gradient(y, v, delta))

        self.factors = memory.factors(self.W, k, pull)

    def read(self, q: Tensor) -> Tensor:
        """M(q_t; W_t), (N, C, K) -> (N, C, V)."""
        apply = {"chunk": self._at_start, "token": self._behind_token, "exact": self._by_token()}[self.rule.reads]
        return self.rule.memory.output(self.rule.memory.network(apply, q), q, self.norm)

    def _at_start(self, l: int, x: Tensor) -> Tensor:
        return x @ self.W[l].mT

    def _behind_token(self, l: int, x: Tensor) -> Tensor:
        """A product with the matrix at the beginning, less one masked attention."""
        e, h = self.factors[l]
        near = self.weigh.on_keys if l in self.rule.memory.on_keys else None  # made for all chunks at once
        near = self.weigh.gradients * (x @ h.mT) if near is None else near
        y = self.weigh.start * (x @ self.A[l].mT) - near @ e
        if self.weigh.sums is not None:
            y = y + self.weigh.sums * (x @ self.S[l].mT)
        scale = self.scales[l]
        return y if scale is None else scale * y

    def _by_token(self) -> Apply:
        """Every token's weights, formed: (N, C, out, in) numbers."""
        made: dict[int, Tensor] = {}

        def apply(l: int, x: Tensor) -> Tensor:
            if l not in made:
                e, h = self.factors[l]
                total = torch.einsum("nti,nio,nip->ntop", self.weigh.gradients, e, h)
                A = self.weigh.start.unsqueeze(-1) * self.A[l].unsqueeze(1) - total
                if self.weigh.sums is not None:
                    A = A + self.weigh.sums.unsqueeze(-1) * self.S[l].unsqueeze(1)
                made[l] = self.rule.retention.weights(A)
            return (made[l] @ x.unsqueeze(-1)).squeeze(-1)

        return apply

    def after(self, full: bool | Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Accumulators and running sums behind the chunk; where it is not full, those at its beginning."""
        if full is False:
            return list(self.A), list(self.S)
        A, S = zip(*(self._behind(l) for l in range(len(self.A))), strict=True)
        S = tuple(x for x in S if x is not None)
        if isinstance(full, Tensor):
            A = tuple(torch.where(full, a, b) for a, b in zip(A, self.A, strict=True))
            S = tuple(torch.where(full, a, b) for a, b in zip(S, self.S, strict=True))
        return list(A), list(S)

    def _behind(self, l: int) -> tuple[Tensor, Tensor | None]:
        (e, h), weigh = self.factors[l], self.weigh
        total = (e * weigh.gradients[:, -1].unsqueeze(-1)).mT @ h
        A = weigh.start[:, -1:] * self.A[l] - self.rule.algorithm.update(total)
        S = None
        if weigh.sums is not None and weigh.last_sums is not None and weigh.last_gradients is not None:
            A = A + weigh.sums[:, -1:] * self.S[l]
            S = weigh.last_sums * self.S[l] - (e * weigh.last_gradients).mT @ h
        return self.rule.retention.border(self.A[l], A), S
