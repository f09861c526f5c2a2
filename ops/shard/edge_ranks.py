"""Operators whose element costs as much as running: the ranks at the ends of the sequence run once and make none."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.ops.core.algebra import Affine
from zoo.ops.core.autograd import apply
from zoo.ops.core.differentiation import ON_ONE_RANK, first_order
from zoo.ops.shard.prefix_scan import SCANS, cut_here, incoming_state
from zoo.ops.shard.scope import Scope

Run = Callable[[Tensor], tuple[Tensor, Tensor]]


def run_from_incoming(
    kind: type[Any],
    element: Callable[[], Affine],
    run: Run,
    state: Tensor,
    several: bool = False,
    *,
    inputs: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Run a stretch from the states that the earlier ranks make: `run(incoming_state(element(), ...))`, but cheaper.

    The first rank runs on from its own states and sends what comes out, the last only receives. That pays where an
    element is a scan of its own; where it is cheap, as a product of matrices is, `incoming_state` sends it earlier.

    Args:
        kind: class of the element, of zoo.ops.core.algebra.
        element: makes that of this rank's stretch; with several documents of the last one, on its own. Called on ranks
            that have neighbours on both sides.
        run: states before -> (outputs, states after); called once. Differentiable.
        state, several, inputs: as for `incoming_state`; all inputs of the operator.

    Returns:
        What `run` does.
    """
    active = cut_here()
    if active is None:
        return run(state)
    rank, size = active.shard.rank, active.shard.size
    if rank == 0:
        y, after = run(state)
        handed_on: tuple[Tensor, Tensor] = apply(_HandOn, active, kind, several, y, after)
        return handed_on
    if rank + 1 < size:
        return run(incoming_state(element(), state, several, inputs=inputs))
    passing = kind.identity((state[-1:] if several else state).detach())
    return run(incoming_state(passing, state, several, inputs=inputs))


class _HandOn(torch.autograd.Function):
    """The first rank's part of the exchange, behind its run: its last state goes, the gradient of that comes."""

    @staticmethod
    def forward(
        ctx: Any, active: Scope, kind: type[Any], several: bool, y: Tensor, after: Tensor
    ) -> tuple[Tensor, Tensor]:
        leaving = after[-1:] if several else after
        element = kind.identity(leaving).reset_to(leaving)
        ctx.method, ctx.kind, ctx.several = SCANS[active.shard.method](active.shard, kind), kind, several
        active.arrival(lambda: ctx.method.forward(element, torch.zeros_like(leaving)))
        ctx.save_for_backward(element[0])
        return y.view_as(y), after.view_as(after)

    @staticmethod
    @first_order("sequence shard", ON_ONE_RANK)
    def backward(ctx: Any, dy: Tensor, dafter: Tensor) -> tuple[Tensor | None, ...]:
        (transition,) = ctx.saved_tensors
        leaving = dafter[-1:] if ctx.several else dafter
        G = ctx.method.backward(ctx.kind(transition, torch.zeros_like(leaving)))
        dafter = dafter.clone()
        (dafter[-1:] if ctx.several else dafter).add_(G)
        return None, None, None, dy, dafter
