"""Time cut across the ranks of a process group: which slice is here, and what crosses its edges.

    with shard.use(shard.SequenceShard(group)):
        logits, state = model(tokens)  # every rank holds the next stretch of the same sequences, in order of rank

Operators with a state ask once and receive the state at their left edge; nothing above them knows. The state that they
return is the one at the right edge of the rank's own stretch. A `state` that is passed in is respected on the first
rank; on later ranks the past is what the earlier ranks send.

Packed documents: every rank gets its slice of the flattened stream with the boundaries that `local_boundaries` makes.
The first local document is the one that goes on from earlier ranks: where a new document begins exactly at the edge,
an empty one comes first. The last local document goes on to later ranks.

Every exchange remembers its shard, because the backward pass runs when the `with` is over.
"""

import bisect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.ops.algebra import Affine, Tail

METHODS = ("allgather",)


@dataclass(frozen=True)
class SequenceShard:
    """One rank's place in a sequence that is cut across a process group.

    Args:
        group: the process group whose ranks hold the stretches in order; None for the default group.
        method: how states cross ranks; "allgather": every rank gets the elements of all and folds those before it.

    Attributes: rank and size, in the group.
    """

    group: dist.ProcessGroup | None = None
    method: str = "allgather"
    rank: int = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"SequenceShard: method must be one of {', '.join(METHODS)}; got {self.method!r}")
        if not dist.is_initialized():
            raise ValueError("SequenceShard: needs a process group; call torch.distributed.init_process_group first")
        object.__setattr__(self, "rank", dist.get_rank(self.group))
        object.__setattr__(self, "size", dist.get_world_size(self.group))
        if self.rank < 0:
            raise ValueError("SequenceShard: this process is no member of the group; make it on the group's ranks only")


class _Scope(NamedTuple):
    """The current shard, and where arrivals are written down or read back when activations are recomputed."""

    shard: SequenceShard
    records: tuple[list[Tensor], ...] = ()
    replay: Iterator[Tensor] | None = None

    def arrival(self, exchange: Callable[[], Tensor]) -> Tensor:
        """What an exchange brings; a recomputation reads it back and sends nothing."""
        arrived = exchange() if self.replay is None else next(self.replay).detach()
        for record in self.records:
            record.append(arrived.detach())
        return arrived


_SCOPE: ContextVar[_Scope | None] = ContextVar("zoo_sequence_shard", default=None)
_ENTERED: list[None] = []  # one entry per scope open on any thread: torch.compile can read a list, not a ContextVar


def _scope() -> _Scope | None:
    return _SCOPE.get() if _ENTERED else None


class _Entering(AbstractContextManager[None]):
    """Sets the scope; may be entered again, as recomputation does."""

    def __init__(self, scope: Callable[[], _Scope | None]):
        self._scope = scope
        self._tokens: list[Token[_Scope | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_SCOPE.set(self._scope()))
        _ENTERED.append(None)

    def __exit__(self, *error: object) -> None:
        _ENTERED.pop()
        _SCOPE.reset(self._tokens.pop())


def use(shard: SequenceShard | None) -> AbstractContextManager[None]:
    """Everything inside is one rank's stretch of time; None switches an outer shard off."""
    return _Entering(lambda: None if shard is None else _Scope(shard))


def current() -> SequenceShard | None:
    """The shard in use here, or None."""
    scope = _scope()
    return None if scope is None else scope.shard


def refuse(what: str) -> None:
    """Raise where a computation would silently take its own stretch of time for the whole sequence."""
    if current() is not None:
        raise ValueError(
            f"{what} cannot be cut across ranks: each would take its stretch of time for the whole sequence; "
            "run it outside zoo.ops.shard.use(...)"
        )


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of torch.utils.checkpoint: recomputation keeps the shard, reads arrivals back and sends nothing."""
    scope = _scope()
    if scope is None:
        return nullcontext(), nullcontext()
    tape: list[Tensor] = []
    forward = _Scope(scope.shard, (*scope.records, tape), scope.replay)
    return _Entering(lambda: forward), _Entering(lambda: _Scope(scope.shard, (), iter(tape)))


def incoming_state(element: Affine, state: Tensor, several: bool = False) -> Tensor:
    """The state at the left edge of this rank's stretch: all earlier ranks' elements, applied in order.

    Args:
        element: of this rank's stretch; with several documents of the last one, on its own.
        state: the states before the first token. On the first rank they are kept; on the others the first document's
            row, or all rows of a batch, is replaced by what arrives.
        several: the stretch holds more than one packed document, so that what arrives ends inside.

    Returns:
        As `state`. Gradients reach every rank whose tokens made it, and the first rank's `state`.

    Cost: one all-gather of the elements forward and one backward; the fold is linear in the number of ranks.
    """
    scope = _scope()
    if scope is None or scope.shard.size == 1:
        return state
    if several:
        element = element.reset_to(element.apply(state[-1:]))
    transition, b = element
    first = _Scan.apply(scope, type(element), state[:1] if several else state, transition, b)
    return torch.cat([first, state[1:]]) if several else first


def halo(tail: Tail, state: Tensor, several: bool = False) -> Tensor:
    """The rows just before this rank's stretch, (B, width, D), from the previous rank; arguments as `incoming_state`.

    Cost: one message to the next rank and one from the previous one, forward and backward. Stretches shorter than the
    width pass on what they received, one rank after the other.
    """
    scope = _scope()
    if scope is None or scope.shard.size == 1 or tail.width == 0:
        return state
    if several:
        tail = tail.reset_to(tail.apply(state[-1:]))
    first = _Halo.apply(scope, state[:1] if several else state, tail.rows)
    return torch.cat([first, state[1:]]) if several else first


def _gather(shard: SequenceShard, element: Affine) -> list[Any]:
    """The elements of all ranks, by one collective."""
    flat = torch.cat([x.reshape(-1) for x in element])
    everyone = [torch.empty_like(flat) for _ in range(shard.size)]
    dist.all_gather(everyone, flat, group=shard.group)
    parts = (x.split([y.numel() for y in element]) for x in everyone)
    return [type(element)(*(x.view(y.shape) for x, y in zip(part, element, strict=True))) for part in parts]


class _Scan(torch.autograd.Function):
    """Z_{r+1} = A_r Z_r + b_r along the ranks, where Z_0 is the first rank's state.

    With G_r the whole gradient of Z_r and dZ_r the part that rank r's own use of it makes, G_r = dZ_r + A_r^T G_{r+1}:
    the same scan from the other side, with transposed transitions. Then db_r = G_{r+1}, and dA_r is that of A_r Z_r
    under G_{r+1}.
    """

    @staticmethod
    def forward(
        ctx: Any, scope: _Scope, kind: Callable[..., Any], state: Tensor, transition: Tensor, b: Tensor
    ) -> Tensor:
        shard = scope.shard

        def exchange() -> Tensor:
            own = kind(transition, b)
            if shard.rank == 0:
                own = kind(transition, own.apply(state))
            elements = _gather(shard, own)
            if shard.rank == 0:
                return state.clone()
            Z = elements[0].b
            for element in elements[1 : shard.rank]:
                Z = element.apply(Z)
            return Z.clone()

        Z = scope.arrival(exchange)
        ctx.shard, ctx.kind = shard, kind
        ctx.save_for_backward(transition, Z)
        return Z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dZ: Tensor) -> tuple[Tensor | None, ...]:
        shard, (transition, Z) = ctx.shard, ctx.saved_tensors
        elements = _gather(shard, ctx.kind(transition, dZ))
        G = torch.zeros_like(dZ)  # of the state that leaves this rank
        for element in reversed(elements[shard.rank + 1 :]):
            G = element.transposed(element.b).apply(G)
        with torch.enable_grad():
            A, z = transition.detach().requires_grad_(), Z.detach().requires_grad_()
            left = ctx.kind(A, torch.zeros_like(Z)).apply(z)
        dA, dz = torch.autograd.grad(left, (A, z), G)
        return None, None, dZ + dz if shard.rank == 0 else None, dA, G


class _Halo(torch.autograd.Function):
    """The last rows of [what arrived, rows] go to the next rank; their gradient comes back and is added."""

    @staticmethod
    def forward(ctx: Any, scope: _Scope, state: Tensor, rows: Tensor) -> Tensor:
        shard, width = scope.shard, state.shape[1]
        missing = width - rows.shape[1]

        def exchange() -> Tensor:
            if shard.rank == 0:
                arrived = state.clone()
                _swap(shard, torch.cat([arrived[:, width - missing :], rows], dim=1), None, step=1)
            elif not missing:
                arrived = torch.empty_like(state, memory_format=torch.contiguous_format)
                _swap(shard, rows, arrived, step=1)
            else:
                arrived = torch.empty_like(state, memory_format=torch.contiguous_format)
                _swap(shard, None, arrived, step=1)
                _swap(shard, torch.cat([arrived[:, width - missing :], rows], dim=1), None, step=1)
            return arrived

        ctx.shard, ctx.missing = shard, missing
        return scope.arrival(exchange)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dZ: Tensor) -> tuple[Tensor | None, ...]:
        shard, missing = ctx.shard, ctx.missing
        G = torch.zeros_like(dZ, memory_format=torch.contiguous_format)  # of the rows that left; zeros on the last rank
        if missing:
            _swap(shard, None, G, step=-1)
            dZ = dZ.clone()
            dZ[:, dZ.shape[1] - missing :] += G[:, :missing]
            _swap(shard, dZ, None, step=-1)
        else:
            _swap(shard, dZ, G, step=-1)
        return None, dZ if shard.rank == 0 else None, G[:, missing:]


def _swap(shard: SequenceShard, send: Tensor | None, receive: Tensor | None, *, step: int) -> None:
    """Send to the rank `step` further and receive from the rank as far behind; the ends have one neighbour only."""
    work = []
    for action, x, peer in ((dist.isend, send, shard.rank + step), (dist.irecv, receive, shard.rank - step)):
        if x is not None and 0 <= peer < shard.size:
            work.append(dist.P2POp(action, x.contiguous(), group=shard.group, group_peer=peer))
    if work:
        for request in dist.batch_isend_irecv(work):
            request.wait()


def stretch(length: int, rank: int, size: int) -> tuple[int, int]:
    """The tokens of a rank when `length` tokens are cut into `size` stretches as even as can be: [left, right)."""
    return length * rank // size, length * (rank + 1) // size


class LocalBoundaries(NamedTuple):
    """One rank's view of packed documents.

    cu_seqlens: (n + 1,), the boundaries inside the rank's stretch.
    continues: the first local document has tokens on earlier ranks.
    documents: which of all documents each local one is a part of; the leading empty one that says "nothing goes on
        from before" counts as a part of the document before it.
    """

    cu_seqlens: Tensor
    continues: bool
    documents: tuple[int, ...]


def local_boundaries(cu_seqlens: Tensor, rank: int, size: int, length: int) -> LocalBoundaries:
    """The documents on a rank's stretch of the flattened stream of `length` tokens, cut as `stretch` cuts.

    Empty documents vanish; a document that is only passing through a rank without tokens stays, so that its state does.
    """
    left, right = stretch(length, rank, size)
    cuts = cu_seqlens.tolist()
    if cuts[0] != 0 or cuts[-1] != length:
        raise ValueError(
            f"local_boundaries: cu_seqlens must start at 0 and end at the length {length}; got {cuts[0]} and {cuts[-1]}"
        )
    inside = [c for c in sorted(set(cuts)) if left < c < right]
    fresh = 0 < left < length and left in cuts  # a document begins at the left edge
    local = [left, *([left] if fresh else []), *inside, right]
    # a document is named by its last start at or before its first token
    documents = [bisect.bisect_right(cuts, min(start, length - 1)) - 1 for start in local[:-1]]
    if fresh:
        documents[0] -= 1
    boundaries = torch.tensor([c - left for c in local], dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return LocalBoundaries(boundaries, left > 0 and not fresh, tuple(documents))
