"""Scalar decays inside a chunk of time: products of neighbouring gates, from their logarithms."""

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
