"""The definition of a memory that learns at test time: one token after the other, gradients by torch.func.grad."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ops.memories.test_time_memory.memory import Norm
from zoo.ops.memories.test_time_memory.rule import MemoryRule
from zoo.ops.memories.test_time_memory.state import MemoryState


class Tokens(NamedTuple):
    """q, k (B, T, H, K), v (B, T, H, V) and the gates (B, T, H) by their names, all in the dtype of states."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: tuple[Tensor, ...]


def memory_reference(rule: MemoryRule, tokens: Tokens, norm: Norm, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """Rows whose open chunks hold equally many tokens go together; T at least 1."""
    filled = state.filled.tolist()
    if len(set(filled)) == 1:
        return _rows(rule, tokens, norm, state, filled[0])
    parts = []
    for i, n in enumerate(filled):
        row = slice(i, i + 1)
        own = MemoryState(
            tuple(x[row] for x in state.weights), tuple(x[row] for x in state.momentum), state.chunk[row],
            state.filled[row],
        )  # fmt: skip
        q, k, v, gates = tokens
        parts.append(_rows(rule, Tokens(q[row], k[row], v[row], tuple(x[row] for x in gates)), norm, own, n))
    ys, states = zip(*parts, strict=True)
    weights = tuple(torch.cat(x) for x in zip(*(s.weights for s in states), strict=True))
    momentum = tuple(torch.cat(x) for x in zip(*(s.momentum for s in states), strict=True))
    chunk, count = torch.cat([s.chunk for s in states]), torch.cat([s.filled for s in states])
    return torch.cat(ys), MemoryState(weights, momentum, chunk, count)


def _rows(rule: MemoryRule, tokens: Tokens, norm: Norm, state: MemoryState, filled: int) -> tuple[Tensor, MemoryState]:
    """The loop: the tokens of the open chunk first, whose outputs an earlier call gave."""
    q, k, v, gates = tokens
    C, K, V = rule.chunk_size, k.shape[-1], v.shape[-1]
    seen = torch.cat([k, v, torch.stack(gates, dim=-1)], dim=-1).transpose(1, 2)  # (B, H, T, K + V + gates)
    seen = torch.cat([state.chunk[:, :, :filled], seen], dim=2)
    start, retention = state.weights, rule.retention
    A, S = list(start), list(state.momentum) or [torch.zeros_like(x) for x in start]
    sums, W = tuple(S), [retention.weights(x) for x in start]  # at the beginning of the chunk
    ys = []

    def loss(W: Sequence[Tensor], k_t: Tensor, v_t: Tensor, delta: Tensor | None) -> Tensor:
        value = rule.loss.value(rule.memory(W, k_t, norm), v_t, delta)
        return value.sum()  # every row and head has weights of its own

    for t in range(seen.shape[2]):
        k_t, v_t, now = seen[:, :, t].split([K, V, len(gates)], dim=-1)  # (B, H, .)
        gate = dict(zip(rule.gates, now.unsqueeze(-1).unbind(-2), strict=True))  # (B, H, 1) each
        keep = gate["g"].exp().unsqueeze(-1)

        for i, gradient in enumerate(torch.func.grad(loss)(W, k_t, v_t, gate.get("delta"))):
            step = gate["eta"].unsqueeze(-1) * gradient
            if rule.algorithm.momentum:
                S[i] = gate["theta"].exp().unsqueeze(-1) * S[i] - step
                A[i] = keep * A[i] + S[i]
            elif rule.algorithm.by_chunk:
                S[i], A[i] = keep * S[i] + step, keep * A[i]
            else:
                A[i] = keep * A[i] - step
        if t >= filled:
            ys.append(rule.memory(_read(rule, start, W, A), q[:, t - filled], norm))
        if t % C == C - 1:  # the chunk is full: the weights of the next one
            if rule.algorithm.by_chunk:
                A = [a - rule.algorithm.update(s) for a, s in zip(A, S, strict=True)]
                S = [torch.zeros_like(s) for s in S]
            A = [retention.border(before, after) for before, after in zip(start, A, strict=True)]
            start, sums, W = tuple(A), tuple(S), [retention.weights(x) for x in A]
    kept = seen.shape[2] % C
    chunk = torch.nn.functional.pad(seen[:, :, seen.shape[2] - kept :], (0, 0, 0, C - kept))
    count = torch.full_like(state.filled, kept)
    return torch.stack(ys, dim=1), MemoryState(start, sums if rule.algorithm.momentum else (), chunk, count)


def _read(rule: MemoryRule, start: Sequence[Tensor], W: list[Tensor], A: list[Tensor]) -> list[Tensor]:
    """The weights that the token's query meets, from the accumulators behind its update."""
    if rule.reads == "chunk":
        return W
    if rule.reads == "exact":
        return [rule.retention.weights(a) for a in A]
    factors = [rule.retention.factor(x) for x in start]
    return [a if f is None else f * a for f, a in zip(factors, A, strict=True)]
