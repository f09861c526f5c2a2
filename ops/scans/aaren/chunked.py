"""Fast torch form: softmax attention inside chunks of time, with everything before a chunk as one more key of it.

A stretch of time is one key. Its score is the logarithm of its sum of exp(s), kept as m + log u with the largest score
m, and its value is its average a. Chunks are such keys, too. So the same function, one level up, gives what lies before
each of them:

    tokens     1 2 3 | 4 5 6 | 7 8 9
    chunks       c1      c2      c3         each one key
    prefixes     p1      p2                 of the chunks' keys, by this form again
    softmax    p0 1 2 3 | p1 4 5 6 | p2 7 8 9   at each position over the prefix and the chunk's tokens up to it

Scores are only ever subtracted from the largest of those before them. No exponent is above 0 and no sum is 0, for
scores that grow by 8 a token as for constant ones. The gradient is that of softmaxes over at most CHUNK + 1 keys: one
that holds all the weight gets none, without large numbers that cancel. The maxima carry no gradient, since no softmax
changes with them.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.core.algebra import LogSumExp

CHUNK = 32


def aaren_chunked(s: Tensor, v: Tensor, state: LogSumExp) -> tuple[Tensor, LogSumExp]:
    """As `aaren_reference`; T at least 1."""
    B, T, H, V = v.shape
    m, a = s.transpose(1, 2).reshape(B * H, T), v.transpose(1, 2).reshape(B * H, T, V)
    o, _ = _prefixes(_Keys(m, torch.zeros_like(m), a), _Keys.of(state), ends=False)
    return o.view(B, H, T, V).transpose(1, 2), state.then(aaren_element(s, v))


def aaren_step(s: Tensor, v: Tensor, state: LogSumExp) -> tuple[Tensor, LogSumExp]:
    """One token, T = 1: what decoding calls."""
    last = state.then(LogSumExp(s[:, 0], torch.ones_like(s[:, 0]), v[:, 0]))
    return (last.w / last.u.unsqueeze(-1)).unsqueeze(1), last


def aaren_element(s: Tensor, v: Tensor) -> LogSumExp:
    """What a stretch adds to any state: s (B, T, H), v (B, T, H, V); nothing where T = 0."""
    if not s.shape[1]:
        return LogSumExp.identity(v.new_zeros(v.shape[0], *v.shape[2:]))
    m = s.amax(1)
    e = (s - m.unsqueeze(1)).exp()
    return LogSumExp(m, e.sum(1), torch.einsum("bth,bthv->bhv", e, v))


class _Keys(NamedTuple):
    """Stretches of time as keys: m and log_u (N, T), a (N, T, V); exp(m + log_u) weighs the average a."""

    m: Tensor
    log_u: Tensor
    a: Tensor

    @classmethod
    def of(cls, state: LogSumExp) -> Self:
        """One key a row and head, T = 1; what saw nothing has log_u = -inf."""
        m, u, w = state.m.reshape(-1, 1), state.u.reshape(-1, 1), state.w.flatten(0, 1).unsqueeze(1)
        seen = u > 0
        u = u.where(seen, torch.ones_like(u))  # else 0 * inf in the backward pass
        return cls(m, u.log().masked_fill(~seen, float("-inf")), w / u.unsqueeze(-1))

    def chunks(self) -> Self:
        """(N, n, C) and (N, n, C, V); what fills the last one up weighs nothing."""
        over = -self.m.shape[1] % CHUNK
        m, log_u = F.pad(self.m, (0, over), value=float("-inf")), F.pad(self.log_u, (0, over))
        a = F.pad(self.a, (0, 0, 0, over))
        return type(self)(*(x.unflatten(1, (-1, CHUNK)) for x in (m, log_u, a)))

    def joined(self) -> Self:
        """Each chunk as one key, (N, n) and (N, n, V)."""
        m = self.m.amax(-1)
        scores = self.m - m.unsqueeze(-1) + self.log_u
        a = (scores.softmax(-1).unsqueeze(-2) @ self.a).squeeze(-2)
        return type(self)(m, scores.logsumexp(-1), a)


def _prefixes(keys: _Keys, before: _Keys, *, ends: bool) -> tuple[Tensor, _Keys]:
    """The averages (N, T, V) over `before` and all keys up to each; with `ends` those prefixes as keys as well."""
    T = keys.m.shape[1]
    chunks = keys.chunks() if T > CHUNK else _Keys(*(x.unsqueeze(1) for x in keys))
    if T > CHUNK:
        _, after = _prefixes(chunks.joined(), before, ends=True)
        before = _Keys(*(torch.cat([x, y[:, :-1]], dim=1) for x, y in zip(before, after, strict=True)))  # (N, n)
    m, log_u, a = (torch.cat([x.unsqueeze(2), y], dim=2) for x, y in zip(before, chunks, strict=True))  # (N, n, 1 + C)
    largest = m.cummax(-1).values[..., 1:]  # (N, n, C)
    scores = (m.unsqueeze(-2) - largest.unsqueeze(-1)).add_(log_u.unsqueeze(-2))  # (N, n, C, 1 + C)
    scores = scores.masked_fill_(_later(largest.shape[-1], m.device), float("-inf"))
    averages = (scores.softmax(-1) @ a).flatten(1, 2)[:, :T]
    if not ends:
        return averages, keys
    m, log_u = (x.flatten(1, 2)[:, :T] for x in (largest, scores.logsumexp(-1)))
    return averages, _Keys(m, log_u, averages)


def _later(C: int, device: torch.device) -> Tensor:
    """(C, 1 + C), True where a chunk's key lies behind the position; the prefix, first, lies before all."""
    return torch.ones(C, 1 + C, dtype=torch.bool, device=device).triu(2)
