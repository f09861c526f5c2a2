"""The rows beyond a rank's edges, for convolutions and token shifts: one message to the neighbour, one back."""

from typing import Any

import torch
from torch import Tensor

from zoo.ops.core.algebra import Tail
from zoo.ops.core.autograd import apply
from zoo.ops.core.differentiation import ON_ONE_RANK, first_order
from zoo.ops.shard import exchange
from zoo.ops.shard.scope import Scope, from_the_right, scope
from zoo.ops.shard.sequence_shard import SequenceShard


def halo(tail: Tail, state: Tensor, several: bool = False) -> Tensor:
    """The rows just before this rank's stretch, (B, width, D), from the previous rank; arguments as `incoming_state`.

    Raises:
        ValueError: the shard's layout is not contiguous.

    Cost: one message to the next rank and one from the previous one, forward and backward. Stretches shorter than the
    width pass on what they received, one rank after the other.
    """
    active = scope()
    if active is None or active.shard.size == 1 or tail.width == 0:
        return state
    active.shard.require_contiguous("a convolution over time")
    if several:
        tail = tail.reset_to(tail.apply(state[-1:]))
    first = apply(_Halo, active, state[:1] if several else state, tail.rows)
    return torch.cat([first, state[1:]]) if several else first


def rows_before(x: Tensor, width: int, cuts: tuple[int, ...] | None = None) -> Tensor:
    """The `width` rows just before this rank's stretch, without a state: for what sees both sides.

    Args:
        x: this rank's stretch, (B, T, D).
        width: rows wanted.
        cuts: the local boundaries of packed documents, B = 1; the rows are those of the first one.

    Returns:
        (B, width, D); zeros before the beginning of a document, and all zeros without a shard.

    Raises:
        ValueError: the shard's layout is not contiguous.

    Cost: as `halo`.
    """
    several = cuts is not None and len(cuts) > 2
    own = x[:, cuts[-2] :] if several and cuts is not None else x
    return halo(Tail.of(own, width), x.new_zeros(x.shape[0], width, x.shape[2]), several)


def rows_after(x: Tensor, width: int, cuts: tuple[int, ...] | None = None) -> Tensor:
    """The `width` rows just after this rank's stretch, those of its last document; otherwise as `rows_before`."""
    with from_the_right():
        return rows_before(x.flip(1), width, None if cuts is None else mirrored(cuts)).flip(1)


def mirrored(cuts: tuple[int, ...]) -> tuple[int, ...]:
    """The boundaries of the same documents when time runs the other way."""
    return tuple(cuts[-1] - cut for cut in reversed(cuts))


class _Halo(torch.autograd.Function):
    """The last rows of [what arrived, rows] go to the next rank; their gradient comes back and is added."""

    @staticmethod
    def forward(ctx: Any, active: Scope, state: Tensor, rows: Tensor) -> Tensor:
        shard, width = active.shard, state.shape[1]
        missing = width - rows.shape[1]

        def bring() -> Tensor:
            if shard.rank == 0:
                arrived = state.clone()
                _shift(shard, torch.cat([arrived[:, width - missing :], rows], dim=1), None, step=1)
            elif not missing:
                arrived = _shift(shard, rows, state, step=1)
            else:
                arrived = _shift(shard, None, state, step=1)
                _shift(shard, torch.cat([arrived[:, width - missing :], rows], dim=1), None, step=1)
            return arrived

        ctx.shard, ctx.missing = shard, missing
        return active.arrival(bring)

    @staticmethod
    @first_order("sequence shard", ON_ONE_RANK)
    def backward(ctx: Any, dZ: Tensor) -> tuple[Tensor | None, ...]:
        shard, missing = ctx.shard, ctx.missing
        if missing:
            G = _shift(shard, None, dZ, step=-1)
            dZ = dZ.clone()
            dZ[:, dZ.shape[1] - missing :] += G[:, :missing]
            _shift(shard, dZ, None, step=-1)
        else:
            G = _shift(shard, dZ, dZ, step=-1)
        return None, dZ if shard.rank == 0 else None, G[:, missing:]


def _shift(shard: SequenceShard, x: Tensor | None, like: Tensor | None, *, step: int) -> Tensor:
    """x to the rank `step` further, and what comes from the rank as far behind; zeros where there is none."""
    ends = range(shard.size)
    to, source = shard.rank + step, shard.rank - step
    sends = {to: x} if x is not None and to in ends else {}
    receives = {source: like} if like is not None and source in ends else {}
    received = exchange.swap(shard, sends, receives, "halo")
    if source in received:
        return received[source]
    return torch.zeros(()) if like is None else torch.zeros_like(like, memory_format=torch.contiguous_format)
