"""The state at a rank's left edge: an exclusive scan of elements along the ranks, and its reverse for gradients.

Z_{r+1} = A_r Z_r + b_r, where Z_0 is the first rank's state. With G_r the whole gradient of Z_r and dZ_r the part that
rank r's own use of it makes, G_r = dZ_r + A_r^T G_{r+1}: the same scan from the other side, with transposed
transitions. Then db_r = G_{r+1}, and dA_r is that of A_r Z_r under G_{r+1}.

| method | a rank receives, each way | in |
|---|---|---|
| allgather | (P - 1)(state + transition) | one all-gather |
| lasp2 | forward the same; backward (P - 1) states | one all-gather |
| lasp | one state | P - 1 messages, one after the other |
| zeco | one state | P - 2 + b messages of 1/b of it, all ranks at once |

A chain never sends a transition: each rank applies its own. Blocks are columns of the state, each of which obeys the
same recurrence, since transitions act from the left.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.ops.core.algebra import Affine
from zoo.ops.core.autograd import apply
from zoo.ops.core.differentiation import ON_ONE_RANK, first_order
from zoo.ops.shard import exchange
from zoo.ops.shard.scope import Scope, scope
from zoo.ops.shard.sequence_shard import SequenceShard

Kind = Callable[..., Any]  # a class of zoo.ops.core.algebra, (transition, b) -> element


def incoming_state(
    element: Affine, state: Tensor, several: bool = False, *, inputs: Sequence[Tensor | None] = ()
) -> Tensor:
    """The state at the left edge of this rank's stretch: all earlier ranks' elements, applied in order.

    Args:
        element: of this rank's stretch; with several documents of the last one, on its own.
        state: the states before the first token. On the first rank they are kept; on the others the first document's
            row, or all rows of a batch, is replaced by what arrives.
        several: the stretch holds more than one packed document, so that what arrives ends inside.
        inputs: of the operator, where `element` is not made of them: wherever autograd asks for a gradient of one it
            must come by here, for other ranks wait.

    Returns:
        As `state`. Gradients reach every rank whose tokens made it, and the first rank's `state`.

    Raises:
        ValueError: the shard's layout is not contiguous, or its method sends heads and not states.

    Cost: by the shard's method, see the table of this file.
    """
    active = cut_here()
    if active is None:
        return state
    if several:
        element = element.reset_to(element.apply(state[-1:]))
    transition, b = element
    first = apply(_Scan, active, type(element), state[:1] if several else state, transition, b, *inputs)
    return torch.cat([first, state[1:]]) if several else first


def cut_here() -> Scope | None:
    """The scope in use, or None where a state crosses no edge."""
    active = scope()
    if active is None or active.shard.size == 1:
        return None
    active.shard.require_contiguous("an operator with a state")
    if active.shard.method not in SCANS:
        raise ValueError(
            f"method {active.shard.method!r} sends heads from rank to rank, and this operator has none to send; "
            f"use one of {', '.join(SCANS)}"
        )
    return active


def all_reduce_max(x: Tensor) -> Tensor:
    """The largest of all ranks' x, a number; NaN where one is NaN. Without a shard, x."""
    active = scope()
    if active is None or active.shard.size == 1:
        return x
    shard = active.shard
    return active.arrival(lambda: torch.cat(exchange.all_gather(shard, x.reshape(1), "state")).amax())


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, active: Scope, kind: Kind, state: Tensor, transition: Tensor, b: Tensor, *inputs: Tensor | None
    ) -> Tensor:
        shard = active.shard
        ctx.method = SCANS[shard.method](shard, kind)
        Z = active.arrival(lambda: ctx.method.forward(kind(transition, b), state))
        ctx.first, ctx.kind, ctx.inputs = shard.rank == 0, kind, len(inputs)
        ctx.save_for_backward(transition, Z)
        return Z

    @staticmethod
    @first_order("sequence shard", ON_ONE_RANK)
    def backward(ctx: Any, dZ: Tensor) -> tuple[Tensor | None, ...]:
        transition, Z = ctx.saved_tensors
        G = ctx.method.backward(ctx.kind(transition, dZ))
        with torch.enable_grad():
            A, z = transition.detach().requires_grad_(), Z.detach().requires_grad_()
            left = ctx.kind(A, torch.zeros_like(Z)).apply(z)
        dA, dz = torch.autograd.grad(left, (A, z), G)
        return None, None, dZ + dz if ctx.first else None, dA, G, *(None for _ in range(ctx.inputs))


def crossing(kind: type[Any], several: bool = False) -> "Crossing | None":
    """The exchange of `incoming_state` for an operator that does it inside its own autograd function.

    `incoming_state` lets an operator run its stretch twice, for the element and for the outputs, and autograd go back
    through both. With a `Crossing` the operator prepares once what both need, forward and backward.

    Args:
        kind: a class of zoo.ops.core.algebra.
        several: as for `incoming_state`.

    Returns:
        None where nothing crosses: no shard is in use, or it has one rank.

    Raises:
        ValueError: as `incoming_state`.
    """
    active = cut_here()
    return None if active is None else Crossing(active, kind, several)


class Crossing:
    """One call of an operator: `forward` in the forward of its autograd function, then `backward` in its backward.

    The ranks at the ends of the sequence need no element: the first runs on from its states and sends what comes out,
    the last only receives; backward the other way round.
    """

    def __init__(self, active: Scope, kind: type[Any], several: bool):
        self._scope, self._kind, self._several = active, kind, several
        self._scanner = SCANS[active.shard.method](active.shard, kind)
        self._first, self._last = active.shard.rank == 0, active.shard.rank + 1 == active.shard.size

    def forward(
        self,
        state: Tensor,
        element: Callable[[], Affine],
        run: Callable[[Tensor], Tensor],
        rest: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Run the stretch from the states that the earlier ranks make.

        Args:
            state: the states before the first token, as for `incoming_state`.
            element: makes that of this rank's stretch; with several documents of the last one, on its own. Called on
                ranks that have neighbours on both sides, and not when activations are recomputed.
            run: states before -> states after; called once.
            rest: what needs no state; called once, where it keeps nobody waiting.

        Returns:
            The transition of this rank's stretch, to be saved for `backward`.
        """
        entering = self._of_first(state)
        passing = self._kind.identity(entering)

        def exchange(leaving: Affine) -> tuple[Tensor, Tensor]:
            return self._scanner.forward(leaving, entering), leaving[0]

        if self._first:
            leaving = passing.reset_to(self._of_last(run(state)))
            _, transition = self._scope.arrivals(lambda: exchange(leaving))
            rest()
            return transition
        if self._last:
            rest()
            Z, transition = self._scope.arrivals(lambda: exchange(passing))
        else:
            Z, transition = self._scope.arrivals(lambda: exchange(self._leaving(element(), state)))
        run(torch.cat([Z, state[1:]]) if self._several else Z)
        if not self._last:
            rest()
        return transition

    def backward(
        self,
        transition: Tensor,
        dafter: Tensor,
        pull: Callable[[], Tensor],
        run: Callable[[Tensor], Tensor],
        rest: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """The same from the other side.

        Args:
            transition: what `forward` returned.
            dafter: gradients of the states after the stretch, as far as this rank made use of them.
            pull: makes the gradient of the states that entered, with several documents of the first one, as far as
                this rank's outputs and dafter ask for it. Called as `element` is.
            run: gradients of the states after -> those of the states before; called once.
            rest: what needs no such gradient; called once, where it keeps nobody waiting.

        Returns:
            The gradient of `state`.
        """
        if self._last:
            dbefore = run(dafter)
            self._scanner.backward(self._kind(transition, self._of_first(dbefore)))
            rest()
        else:
            if self._first:
                rest()
            dZ = torch.zeros_like(self._of_first(dafter)) if self._first else pull()
            dafter = dafter.clone()
            self._of_last(dafter).add_(self._scanner.backward(self._kind(transition, dZ)))
            dbefore = run(dafter)
            if not self._first:
                rest()
        if not self._first:
            self._of_first(dbefore).zero_()  # what was given there was not used
        return dbefore

    def _leaving(self, element: Affine, state: Tensor) -> Affine:
        """Of the whole stretch, where `element` is that of its last document."""
        return element.reset_to(element.apply(state[-1:])) if self._several else element

    def _of_first(self, states: Tensor) -> Tensor:
        return states[:1] if self._several else states

    def _of_last(self, states: Tensor) -> Tensor:
        return states[-1:] if self._several else states


class _Scanner:
    """One way for states to cross: `forward` gives Z of this rank, `backward` G of the state that leaves it."""

    def __init__(self, shard: SequenceShard, kind: Kind):
        self.shard, self.kind = shard, kind

    def blocks(self, element: Affine) -> int:
        """In how many parts of the columns a chain hands a state on."""
        return 1

    def forward(self, element: Affine, state: Tensor) -> Tensor:
        """`element` of this rank's stretch, `state` before the first rank's."""
        raise NotImplementedError

    def backward(self, element: Affine) -> Tensor:
        """`element`: this rank's transition, and dZ for its increment."""
        raise NotImplementedError


class _AllGather(_Scanner):
    """Transitions and increments of all ranks to all, folded in order; keeps nothing for the backward."""

    def forward(self, element: Affine, state: Tensor) -> Tensor:
        rank = self.shard.rank
        if rank == 0:
            element = self.kind(element[0], element.apply(state))
        elements = self._gather(element)
        if rank == 0:
            return state.clone()
        return folded(elements[0].b, elements[1:rank])

    def backward(self, element: Affine) -> Tensor:
        return self._back(self._gather(element), element.b)

    def _back(self, elements: Sequence[Affine], like: Tensor) -> Tensor:
        later = [e.transposed(e.b) for e in reversed(elements[self.shard.rank + 1 :])]
        return folded(torch.zeros_like(like), later)

    def _gather(self, element: Affine) -> list[Affine]:
        flat = torch.cat([x.reshape(-1) for x in element])
        parts = (x.split([y.numel() for y in element]) for x in exchange.all_gather(self.shard, flat, "state"))
        return [self.kind(*(x.view(y.shape) for x, y in zip(part, element, strict=True))) for part in parts]


class _Lasp2(_AllGather):
    """As `_AllGather`, but what the transitions were is remembered: backward only states travel."""

    def forward(self, element: Affine, state: Tensor) -> Tensor:
        self._transitions: list[Tensor] = []
        return super().forward(element, state)

    def _gather(self, element: Affine) -> list[Affine]:
        elements = super()._gather(element)
        self._transitions = [e[0] for e in elements]
        return elements

    def backward(self, element: Affine) -> Tensor:
        if not getattr(self, "_transitions", None):  # recomputation read Z back and met nobody
            return super().backward(element)
        gradients = exchange.all_gather(self.shard, element.b, "state")
        elements = [self.kind(A, dZ) for A, dZ in zip(self._transitions, gradients, strict=True)]
        return self._back(elements, element.b)


class _Lasp(_Scanner):
    """A chain: receive a state, apply the own element, send it on, in `blocks` parts of the columns."""

    def forward(self, element: Affine, state: Tensor) -> Tensor:
        return self._chain(element, state, step=1)

    def backward(self, element: Affine) -> Tensor:
        return self._chain(element.transposed(element.b), torch.zeros_like(element.b), step=-1)

    def _chain(self, element: Affine, initial: Tensor, step: int) -> Tensor:
        """The exclusive scan along the ranks in the direction `step`; `initial` is before its first rank."""
        shard = self.shard
        before, after = shard.rank - step, shard.rank + step
        parts: Sequence[Any] = element.columns(self.blocks(element))
        columns = [part.b.shape[element.axis] for part in parts]
        states = [x.contiguous() for x in initial.split(columns, dim=element.axis)]
        coming = [exchange.receive(shard, x, before, "state") for x in states] if 0 <= before < shard.size else []
        going = []
        for i, part in enumerate(parts):
            if coming:
                states[i] = coming[i].wait()
            if 0 <= after < shard.size:
                going.append(exchange.send(shard, part.apply(states[i]), after, "state"))
        for message in going:
            message.wait()
        return torch.cat(states, dim=element.axis)


class _Zeco(_Lasp):
    """All-Scan: the chain in as many blocks as the link makes worth while, so that the ranks work side by side."""

    def blocks(self, element: Affine) -> int:
        most = max(1, element.b.shape[element.axis])
        if self.shard.blocks is not None:
            return min(self.shard.blocks, most)
        return self.shard.link.blocks(self.shard.size, element.b.nbytes, most)


def folded(state: Tensor, elements: Sequence[Any]) -> Tensor:
    """The state after all elements, in memory of its own."""
    for element in elements:
        state = element.apply(state)
    return state.clone(memory_format=torch.contiguous_format)


SCANS: dict[str, type[_Scanner]] = {"allgather": _AllGather, "lasp": _Lasp, "lasp2": _Lasp2, "zeco": _Zeco}
