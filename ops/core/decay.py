"""Scalar decays inside a chunk of time: products of neighbouring gates, from their logarithms."""

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_LOG = -1e4  # of one step: exp of it is nothing in float64 too, while sums of a chunk stay finite


def sums(a: Tensor) -> Tensor:
    """Running sums of log decays (..., C) in float64, so that their differences are good to the last digit."""
    return a.double().clamp_min(SMALLEST_LOG).cumsum(-1)


def between(l: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(l_i - l_j) for i >= j, the decay over the steps j + 1 ... i, and 0 above the diagonal.

    Args:
        l: running sums of log decays, (..., C), float64; the result is (..., C, C).
        dtype: of the result; float32 takes a difference of two halves, so that its error is that of the difference
            alone, however far the sums have run.
    """
    high = l.to(dtype)
    difference = high.unsqueeze(-1) - high.unsqueeze(-2)
    if dtype != torch.float64:
        low = (l - high).to(dtype)
        difference += low.unsqueeze(-1)
        difference -= low.unsqueeze(-2)
    C = l.shape[-1]
    future = torch.ones(C, C, dtype=torch.bool, device=l.device).triu_(1)
    return difference.masked_fill_(future, float("-inf")).exp_()


def sum_from(x: Tensor) -> Tensor:
    """Sums over the places i >= m of (N, C, ...), along dimension 1."""
    return x.flip(1).cumsum(1).flip(1)


def sum_before(x: Tensor) -> Tensor:
    """Sums over the places j < m of (N, C, ...), along dimension 1."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1].cumsum(1)], dim=1)


def across(pairs: Tensor) -> Tensor:
    """Sums over all i >= t > j of (..., C, C), for every t: what the gate of step t gets from the pairs around it.

    One product with a triangle: the difference of row and column sums would cancel where the gate shuts.
    """
    C = pairs.shape[-1]
    later = torch.ones(C, C, dtype=pairs.dtype, device=pairs.device).triu_()
    return torch.matmul(later, pairs).tril_(-1).sum(-1)


class Halved(NamedTuple):
    """Decays between the steps of chunks of C tokens, none of them a difference of longer sums.

    A chunk is halved again and again. For i in a second half and j in the first half beside it, with the border between
    them, exp(g_{j+1} + ... + g_i) = exp(sum of g from the border to i) * exp(sum of g after j to the border). Both
    exponents are sums of gates that the pair sees and no others: nothing cancels, nothing overflows, exp(-inf) is 0,
    and no later gate touches an earlier weight.
    """

    between: Tensor  # (N, C, C) exp(sum of g over j + 1 ... i) for i >= j, 0 above the diagonal
    before: Tensor  # (N, C) exp(sum of g up to i, i included)
    after: Tensor  # (N, C) exp(sum of g after j)
    total: Tensor  # (N, 1) exp(sum of g over the chunk)


def halved(g: Tensor) -> Halved:
    """Of the log decays of all chunks, (N, C), <= 0 and -inf allowed; C is a power of two."""
    N, C = g.shape
    between = torch.zeros(N, C, C, dtype=g.dtype, device=g.device)
    between.diagonal(dim1=1, dim2=2).fill_(1.0)
    A, Z = g.clone(), torch.zeros_like(g)  # sums inside a block of s steps: up to a step, and after it
    s = 1
    while s < C:
        (A1, A2), Z1 = _halves(A, s), _halves(Z, s)[0]
        _pairs(between, s).addcmul_(A2.exp().unsqueeze(-1), Z1.exp().unsqueeze(-2))
        Z1 += A2[..., -1:]
        A2 += A1[..., -1:]
        s *= 2
    return Halved(between, A.exp(), Z.exp(), A[:, -1:].exp())


def halved_backward(pairs: Tensor, ends: Tensor, starts: Tensor, total: Tensor) -> Tensor:
    """The gradient of g, (N, C), from those of the sums of g that `halved` takes the exponentials of; all by addition.

    Args:
        pairs: of the sums over j + 1 ... i, (N, C, C); only i > j is read.
        ends: of the sums up to i, (N, C). starts: of the sums after j, (N, C). Both are used up.
        total: of the sum over the chunk, (N,).
    """
    s = ends.shape[1]
    ends[:, -1] += total
    while s > 1:
        s //= 2
        (A1, A2), Z1 = _halves(ends, s), _halves(starts, s)[0]
        first, second = A2.sum(-1), Z1.sum(-1)
        block = _pairs(pairs, s)
        A2 += block.sum(-1)
        Z1 += block.sum(-2)
        A1[..., -1] += first
        A2[..., -1] += second
    return ends


def _halves(x: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """(N, C) -> first and second halves of its blocks of 2s steps, both views (N, C / 2s, s)."""
    pairs = x.unflatten(1, (-1, 2, s))
    return pairs[:, :, 0], pairs[:, :, 1]


def _pairs(P: Tensor, s: int) -> Tensor:
    """(N, C, C) -> the blocks [second half, first half], a view (N, C / 2s, s, s)."""
    n = P.shape[1] // (2 * s)
    blocks = P.view(-1, n, 2, s, n, 2, s)[:, :, 1, :, :, 0]
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
