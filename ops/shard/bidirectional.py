"""The states at both edges of a rank's stretch: two exclusive scans along the ranks, one from either side, at once.

Each scan is that of `prefix_scan.py`; the one from the right sees time reversed. Their messages travel together: one
all-gather holds the elements of both, and chains advance hop by hop, block i of a chain passing from its rank r to the
next one in hop r + i. So both ways take the time of one, P - 2 + b hops, and the bytes of two. In the backward pass
each gradient goes the other way.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.core.algebra import Affine
from zoo.ops.core.autograd import apply
from zoo.ops.core.differentiation import ON_ONE_RANK, first_order
from zoo.ops.shard import exchange
from zoo.ops.shard.prefix_scan import SCANS, Kind, cut_here, folded
from zoo.ops.shard.scope import Scope
from zoo.ops.shard.sequence_shard import SequenceShard


def incoming_states(elements: tuple[Affine, Affine], states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What the ranks before make of the state at this rank's left edge, and those after of the one at its right edge.

    Args:
        elements: of this rank's whole stretch, first in the order of time, then of the stretch reversed; both of one
            kind and shape. With several documents each is reset inside, see `zoo.ops.core.algebra`.
        states: before the first token and after the last one of the whole sequence, one row for each row of a batch,
            one of packed documents. The first is kept on the first rank, the second on the last; elsewhere they are
            replaced by what arrives.

    Returns:
        As `states`. Without a shard, `states`.

    Raises:
        ValueError: as `incoming_state`.

    Cost: the bytes of two `incoming_state`, the time of one.
    """
    active = cut_here()
    if active is None:
        return states
    left, right = elements
    arrived: tuple[Tensor, Tensor] = apply(_Scans, active, type(left), *states, *left, *right)
    return arrived


class _Lane(NamedTuple):
    """One scan: time as it sees it, the element of this rank's stretch, the state before its first rank."""

    shard: SequenceShard
    element: Any
    state: Tensor


class _Scans(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, active: Scope, kind: Kind, left: Tensor, right: Tensor, A: Tensor, b: Tensor, A_: Tensor, b_: Tensor
    ) -> tuple[Tensor, ...]:
        shard = active.shard
        lanes = [_Lane(shard, kind(A, b), left), _Lane(shard.reversed(), kind(A_, b_), right)]
        ctx.shard, ctx.kind, ctx.transitions = shard, kind, []
        Z = active.arrivals(lambda: tuple(_cross(lanes, ctx.transitions)))
        ctx.save_for_backward(A, A_, *Z)
        return Z

    @staticmethod
    @first_order("sequence shard", ON_ONE_RANK)
    def backward(ctx: Any, *dZ: Tensor) -> tuple[Tensor | None, ...]:
        A, A_, *Z = ctx.saved_tensors
        views, transitions = (ctx.shard, ctx.shard.reversed()), (A, A_)
        lanes = [
            _Lane(view.reversed(), ctx.kind(a, d).transposed(d.contiguous()), torch.zeros_like(d))
            for view, a, d in zip(views, transitions, dZ, strict=True)
        ]
        states: list[Tensor | None] = []
        parts: list[Tensor] = []
        for view, a, z, d, G in zip(views, transitions, Z, dZ, _uncross(lanes, ctx.transitions), strict=True):
            with torch.enable_grad():
                a, z = a.detach().requires_grad_(), z.detach().requires_grad_()
                leaving = ctx.kind(a, torch.zeros_like(z)).apply(z)
            da, dz = torch.autograd.grad(leaving, (a, z), G)
            states.append(d + dz if view.rank == 0 else None)
            parts += [da, G]
        return None, None, *states, *parts


def _cross(lanes: Sequence[_Lane], transitions: list[list[Tensor]]) -> list[Tensor]:
    """The states that arrive; "lasp2" notes the transitions of all ranks, lane by lane."""
    method = lanes[0].shard.method
    if method not in ("allgather", "lasp2"):
        return _chains(lanes)
    everyone = _gather(lanes[0].shard, [x for lane in lanes for x in _led(lane)])
    gathered = []
    for i, lane in enumerate(lanes):
        elements = [type(lane.element)(*own[2 * i : 2 * i + 2]) for own in everyone]
        gathered.append(elements[::-1] if lane.shard.backwards != lanes[0].shard.backwards else elements)
    if method == "lasp2":
        transitions += [[element[0] for element in elements] for elements in gathered]
    return [_entering(lane, elements) for lane, elements in zip(lanes, gathered, strict=True)]


def _uncross(lanes: Sequence[_Lane], transitions: list[list[Tensor]]) -> list[Tensor]:
    """The same of gradients, whose lanes run against those that noted the transitions."""
    if not transitions:  # another method, or a recomputation, which read Z back and met nobody
        return _cross(lanes, [])
    everyone = _gather(lanes[0].shard, [lane.element.b for lane in lanes])
    entering = []
    for i, (lane, noted) in enumerate(zip(lanes, transitions, strict=True)):
        gradients = [own[i] for own in everyone]
        if lane.shard.backwards != lanes[0].shard.backwards:
            gradients.reverse()
        kind = type(lane.element)
        pairs = zip(reversed(noted), gradients, strict=True)
        entering.append(_entering(lane, [kind(A, dZ).transposed(dZ) for A, dZ in pairs]))
    return entering


def _led(lane: _Lane) -> Any:
    """The lane's element; on its first rank what leaves it is made of the state."""
    kind = type(lane.element)
    return kind(lane.element[0], lane.element.apply(lane.state)) if lane.shard.rank == 0 else lane.element


def _entering(lane: _Lane, elements: Sequence[Any]) -> Tensor:
    """The elements of the ranks before this one, in the lane's order, folded."""
    if lane.shard.rank == 0:
        return lane.state.clone()
    return folded(elements[0].b, elements[1 : lane.shard.rank])


def _gather(shard: SequenceShard, own: Sequence[Tensor]) -> list[list[Tensor]]:
    """Several tensors of every rank in one all-gather, in the order of `shard`'s ranks."""
    flat = torch.cat([x.reshape(-1) for x in own])
    parts = (x.split([y.numel() for y in own]) for x in exchange.all_gather(shard, flat, "state"))
    return [[x.view(y.shape) for x, y in zip(part, own, strict=True)] for part in parts]


def _chains(lanes: Sequence[_Lane]) -> list[Tensor]:
    """Hop by hop, a meeting for each: what two neighbours send each other in one hop crosses on the way."""
    shard = lanes[0].shard
    axis = lanes[0].element.axis
    blocks = SCANS[shard.method](shard, type(lanes[0].element)).blocks(lanes[0].element)
    parts = [lane.element.columns(blocks) for lane in lanes]
    states = [
        [x.contiguous() for x in lane.state.split([part.b.shape[axis] for part in cut], dim=axis)]
        for lane, cut in zip(lanes, parts, strict=True)
    ]
    for hop in range(shard.size - 2 + blocks):
        sends: dict[int, list[Tensor]] = {}
        receives: dict[int, list[Tensor]] = {}
        coming: dict[int, tuple[int, int]] = {}  # {rank: lane and block}
        for i, lane in enumerate(lanes):
            rank, going, arriving = lane.shard.rank, hop - lane.shard.rank, hop - lane.shard.rank + 1
            if rank + 1 < shard.size and 0 <= going < blocks:
                sends[_named(shard, lane, rank + 1)] = [parts[i][going].apply(states[i][going])]
            if rank > 0 and 0 <= arriving < blocks:
                source = _named(shard, lane, rank - 1)
                receives[source], coming[source] = [states[i][arriving]], (i, arriving)
        for source, (arrived,) in exchange.meet(shard, sends, receives, "state").wait().items():
            which, block = coming[source]
            states[which][block] = arrived
    return [torch.cat(state, dim=axis) for state in states]


def _named(shard: SequenceShard, lane: _Lane, rank: int) -> int:
    """A rank of a lane by its number in `shard`."""
    return rank if lane.shard.backwards == shard.backwards else shard.size - 1 - rank
