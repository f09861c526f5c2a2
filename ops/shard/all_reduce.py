"""Sums over all ranks: what a whole sequence is judged by, and masks of which every rank must know the whole."""

from typing import Any

import torch
from torch import Tensor

from zoo.ops.core.autograd import apply
from zoo.ops.core.differentiation import ON_ONE_RANK, first_order
from zoo.ops.shard import exchange
from zoo.ops.shard.layout import token_indices
from zoo.ops.shard.scope import Scope, scope
from zoo.ops.shard.sequence_shard import SequenceShard


def total(x: Tensor) -> Tensor:
    """The sum of all ranks' x, which are of one shape, on every rank; without a shard, x.

    Every rank may go on from it; its gradient is the sum of what all ranks ask for. The order of the sum is that of the
    ranks, so that all get the same bits.

    Cost: (P - 1) x received, each way.
    """
    active = scope()
    if active is None or active.shard.size == 1:
        return x
    summed: Tensor = apply(_Total, active, x)
    return summed


def whole(x: Tensor, shard: SequenceShard, dim: int = 1) -> Tensor:
    """What all ranks hold of a tensor that is cut along `dim`, put together in the order of time; no gradient.

    Cost: P times the whole received; for masks and other small things.
    """
    length = x.shape[dim] * shard.size if shard.length is None else shard.length
    own = token_indices(length, shard.rank, shard.size, shard.layout or "contiguous", shard.chunk).to(x.device)
    shape = list(x.shape)
    shape[dim] = length
    mine = x.detach().to(torch.uint8 if x.dtype == torch.bool else x.dtype)
    laid = mine.new_zeros(shape).index_copy(dim, own, mine)
    return torch.stack(exchange.all_gather(shard, laid)).sum(0).to(x.dtype)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, active: Scope, x: Tensor) -> Tensor:
        ctx.shard = active.shard
        return active.arrival(lambda: _sum(active.shard, x))

    @staticmethod
    @first_order("sequence shard", ON_ONE_RANK)
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        return None, _sum(ctx.shard, d)


def _sum(shard: SequenceShard, x: Tensor) -> Tensor:
    return torch.stack(exchange.all_gather(shard, x)).sum(0)
