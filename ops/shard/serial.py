"""States that no summary can replace: the ranks work one after the other, on micro-batches side by side.

Rank r runs group i of the batch while rank r + 1 runs group i - 1, so that P ranks are busy G / (G + P - 1) of the time
with G groups. The backward pass runs the groups in reverse from the last rank to the first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.ops.core.autograd import apply
from zoo.ops.core.differentiation import ON_ONE_RANK, first_order
from zoo.ops.shard import exchange
from zoo.ops.shard.scope import Scope, scope, use
from zoo.ops.shard.sequence_shard import SequenceShard


def serial(
    run: Callable[..., tuple[Tensor, Tensor]], inputs: Sequence[Tensor], state: Tensor, *, groups: int | None = None
) -> tuple[Tensor, Tensor]:
    """Run `run(*inputs, state)` with the state that comes from the ranks before.

    Args:
        run: ((B, T, ...), ..., state (B, ...)) -> (y (B, T, ...), state), row by row independent.
        inputs: this rank's stretch, (B, T, ...) each; fold heads into the batch to have more rows to work on.
        state: (B, ...), kept on the first rank and replaced by what arrives on the others.
        groups: micro-batches; about four a rank, at most B, when omitted.

    Returns:
        y and the state at the right edge of the rank's stretch. Without a shard, those of one call.

    Raises:
        ValueError: the shard's layout is not contiguous.

    Cost: one state received and one sent each way, in `groups` messages.
    """
    active = scope()
    if active is None or active.shard.size == 1:
        return run(*inputs, state)
    active.shard.require_contiguous("a nonlinear memory")
    rows = state.shape[0]
    groups = max(1, min(rows, 4 * active.shard.size if groups is None else groups))
    cut = [x.tensor_split(groups) for x in (*inputs, state)]
    outputs, states = [], []
    for *parts, before in zip(*cut, strict=True):
        before = apply(_Receive, active, before, *parts)
        with use(None):
            y, after = run(*parts, before)
        y, after = apply(_Send, active, y, after)
        outputs.append(y)
        states.append(after)
    return torch.cat(outputs), torch.cat(states)


class _Receive(torch.autograd.Function):
    """The state from the rank before; its gradient goes back there.

    The inputs are named so that the node is part of the graph, and its gradient sent, on every rank that has one.
    """

    @staticmethod
    def forward(ctx: Any, active: Scope, state: Tensor, *inputs: Tensor) -> Tensor:
        shard = active.shard
        ctx.shard, ctx.count = shard, len(inputs)
        if shard.rank == 0:
            return state.clone()
        return active.arrival(lambda: exchange.receive(shard, state, shard.rank - 1, "state").wait())

    @staticmethod
    @first_order("sequence shard", ON_ONE_RANK)
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        shard: SequenceShard = ctx.shard
        if shard.rank:
            exchange.send(shard, d, shard.rank - 1, "state").wait()
        return None, None if shard.rank else d, *(None for _ in range(ctx.count))


class _Send(torch.autograd.Function):
    """The state to the rank after; the gradient that comes back is added to its own."""

    @staticmethod
    def forward(ctx: Any, active: Scope, y: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        shard = active.shard
        ctx.shard = shard
        if shard.rank + 1 < shard.size and active.tape.replay is None:
            exchange.send(shard, state, shard.rank + 1, "state").wait()
        return y.view_as(y), state.view_as(state)

    @staticmethod
    @first_order("sequence shard", ON_ONE_RANK)
    def backward(ctx: Any, dy: Tensor, d: Tensor) -> tuple[Tensor | None, ...]:
        shard: SequenceShard = ctx.shard
        if shard.rank + 1 < shard.size:
            d = d + exchange.receive(shard, d, shard.rank + 1, "state").wait()
        return None, dy, d
