"""From slices of time to slices of heads and back: any mixer whose heads are independent, without a summary of it.

Before the operator every rank holds all heads of its stretch; two all-to-alls around it give every rank the whole
sequence of its heads. So the state never travels, nonlinear memories included, and activations do: (P - 1) / P of all
inputs and of the output, each way.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from zoo.ops.core.autograd import apply
from zoo.ops.core.differentiation import ON_ONE_RANK, first_order
from zoo.ops.shard import exchange
from zoo.ops.shard.layout import local_boundaries, stretch
from zoo.ops.shard.prefix_scan import all_reduce_max
from zoo.ops.shard.scope import Scope, scope, use
from zoo.ops.shard.sequence_shard import SequenceShard

P = ParamSpec("P")
R = TypeVar("R")


def over_heads(
    *, split: Mapping[str, int], grouped: Mapping[str, int] | None = None, shared: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A public operator that runs over slices of heads where the shard's method is "heads", and as it is elsewhere.

    The operator returns y or (y, state) and takes `state` and `cu_seqlens` by these names; y has heads in dimension 2,
    the state in dimension 1. Then every rank returns the state after the whole sequence, or after the whole of each of
    its documents. What an operator returns beside them are numbers that say how large something may be: the largest of
    all ranks' is returned.

    Args:
        split: {argument: the dimension of its heads}: 2 or 3 for what has time in dimension 1, 0 or 1 for parameters.
        grouped: {argument: the dimension of its groups of heads} for arguments with time in dimension 1; all go to
            every rank, which keeps the groups of its heads.
        shared: arguments with time in dimension 1 that all heads read; all go to every rank.
    """

    def wrap(operator: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(operator)

        @functools.wraps(operator)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            active = scope()
            if active is None or active.shard.method != "heads" or active.shard.size == 1:
                return operator(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            return _run(active, operator, given, split, grouped or {}, shared)  # type: ignore[return-value]

        run.over_heads = True  # type: ignore[attr-defined]
        return run

    return wrap


class _Cut(NamedTuple):
    """How time and heads are cut: [left, right) of every rank."""

    time: list[tuple[int, int]]
    heads: list[tuple[int, int]]


_Turn = Callable[[SequenceShard, Tensor, _Cut], Tensor]


def _run(
    active: Scope,
    operator: Callable[..., Any],
    given: Mapping[str, Any],
    split: Mapping[str, int],
    grouped: Mapping[str, int],
    shared: Sequence[str],
) -> Tensor | tuple[Tensor, ...]:
    shard, name = active.shard, getattr(operator, "__name__", "operator")
    shard.require_contiguous(name)
    shard.require_forward("slices of heads")
    first = next(given[key].movedim(dim, 2) for key, dim in split.items() if dim >= 2)
    cut = _cut(shard, name, first)
    own = slice(*cut.heads[shard.rank])
    taken = dict(given)
    for key, x in given.items():
        if not isinstance(x, Tensor):
            continue
        dim = split.get(key, 0)
        if dim >= 2 and x.shape[dim] == first.shape[2]:
            taken[key] = apply(_Turned, active, x.movedim(dim, 2), cut, _to_heads, _to_time).movedim(2, dim)
        elif key in split and dim < 2:
            taken[key] = x.movedim(dim, 0)[own].movedim(0, dim)
        elif key in grouped:
            everyone = apply(_ToAll, active, x, cut).movedim(grouped[key], 2)
            taken[key] = _groups_of(everyone, first.shape[2], own).movedim(2, grouped[key])
        elif key in shared or key in split:  # one number for all heads
            taken[key] = _everywhere(active, x, cut)
    if given.get("cu_seqlens") is not None:
        taken["cu_seqlens"] = _documents(shard, name, given)
    if given.get("state") is not None:
        taken["state"] = apply(_FromFirst, active, given["state"], first, cut)
    with use(None):
        result = operator(**taken)
    if isinstance(result, Tensor):
        back: Tensor = apply(_Turned, active, result, cut, _to_time, _to_heads)
        return back
    y, state, *numbers = result
    y, state = apply(_Back, active, y, state, cut)
    if shard.documents is not None and given.get("cu_seqlens") is not None:
        local = local_boundaries(taken["cu_seqlens"], shard.rank, shard.size, cut.time[-1][1])
        state = state[list(local.documents)]
    return (y, state, *map(all_reduce_max, numbers))


def _cut(shard: SequenceShard, name: str, x: Tensor) -> _Cut:
    if x.ndim < 3 or x.shape[2] < shard.size:
        raise ValueError(
            f"{name}: method 'heads' needs at least one head (dimension 2) for each of the {shard.size} ranks; got "
            f"{tuple(x.shape)}, use another method"
        )
    length = x.shape[1] * shard.size if shard.length is None else shard.length
    time = [stretch(length, rank, shard.size) for rank in range(shard.size)]
    left, right = time[shard.rank]
    if right - left != x.shape[1]:
        raise ValueError(
            f"{name}: rank {shard.rank} of {shard.size} holds {right - left} of {length} tokens; got {x.shape[1]}, "
            "give SequenceShard the length of the whole sequence"
        )
    return _Cut(time, [stretch(x.shape[2], rank, shard.size) for rank in range(shard.size)])


def _documents(shard: SequenceShard, name: str, given: Mapping[str, Any]) -> Tensor:
    if shard.documents is None:
        raise ValueError(f"{name}: method 'heads' needs the boundaries of all documents; give SequenceShard documents")
    if given.get("state") is not None:
        raise ValueError(f"{name}: method 'heads' takes no initial state beside packed documents; use another method")
    return torch.tensor(shard.documents, device=given["cu_seqlens"].device)


def _groups_of(x: Tensor, heads: int, own: slice) -> Tensor:
    """The groups (dimension 2) that the own heads read: whole groups where heads fill them, else one for each head."""
    each = heads // x.shape[2]  # heads of a group
    if own.start % each == own.stop % each == 0:
        return x[:, :, own.start // each : own.stop // each]
    if own.start // each == (own.stop - 1) // each:
        return x[:, :, own.start // each : own.start // each + 1]
    return x[:, :, torch.arange(own.start, own.stop, device=x.device) // each]


def _everywhere(active: Scope, x: Tensor, cut: _Cut) -> Tensor:
    whole: Tensor = apply(_ToAll, active, x.to(torch.uint8) if x.dtype == torch.bool else x, cut)
    return whole.to(x.dtype)


def _widths(spans: Sequence[tuple[int, int]]) -> list[int]:
    return [right - left for left, right in spans]


def _shaped(x: Tensor, **sizes: int) -> Tensor:
    """An empty tensor of x's shape, but for the sizes of dimensions d0, d1, d2."""
    shape = list(x.shape)
    for name, size in sizes.items():
        shape[int(name[1:])] = size
    return x.new_empty(shape)


def _to_heads(shard: SequenceShard, x: Tensor, cut: _Cut) -> Tensor:
    """(B, own T, H, ...) -> (B, T, own H, ...)."""
    own = _widths(cut.heads)[shard.rank]
    likes = [_shaped(x, d1=n, d2=own) for n in _widths(cut.time)]
    return torch.cat(exchange.all_to_all(shard, x.split(_widths(cut.heads), dim=2), likes), dim=1)


def _to_time(shard: SequenceShard, x: Tensor, cut: _Cut) -> Tensor:
    """(B, T, own H, ...) -> (B, own T, H, ...)."""
    own = _widths(cut.time)[shard.rank]
    likes = [_shaped(x, d1=own, d2=n) for n in _widths(cut.heads)]
    return torch.cat(exchange.all_to_all(shard, x.split(_widths(cut.time), dim=1), likes), dim=2)


class _Turned(torch.autograd.Function):
    """From time to heads, or from heads to time; the gradient the other way."""

    @staticmethod
    def forward(ctx: Any, active: Scope, x: Tensor, cut: _Cut, there: _Turn, back: _Turn) -> Tensor:
        ctx.shard, ctx.cut, ctx.back = active.shard, cut, back
        return active.arrival(lambda: there(active.shard, x, cut))

    @staticmethod
    @first_order("sequence shard", ON_ONE_RANK)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.back(ctx.shard, dy, ctx.cut), None, None, None


class _Back(torch.autograd.Function):
    """Outputs (B, T, own H, ...) -> (B, own T, H, ...); states (n, own H, ...) -> (n, H, ...) on every rank, whose
    gradients are added up.

    One node for both: the states may be used on one rank alone, and then the others must answer in the backward.
    """

    @staticmethod
    def forward(ctx: Any, active: Scope, y: Tensor, state: Tensor, cut: _Cut) -> tuple[Tensor, ...]:
        shard = active.shard
        ctx.shard, ctx.cut = shard, cut
        likes = [_shaped(state, d1=n) for n in _widths(cut.heads)]
        return active.arrivals(
            lambda: (
                _to_time(shard, y, cut),
                torch.cat(exchange.all_to_all(shard, [state] * len(likes), likes), dim=1),
            )
        )

    @staticmethod
    @first_order("sequence shard", ON_ONE_RANK)
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        parts = dstate.split(_widths(ctx.cut.heads), dim=1)
        own = parts[ctx.shard.rank]
        asked = torch.stack(exchange.all_to_all(ctx.shard, parts, [own] * len(parts))).sum(0)
        return None, _to_heads(ctx.shard, dy, ctx.cut), asked, None


class _ToAll(torch.autograd.Function):
    """(B, own T, ...) -> (B, T, ...) on every rank; its gradients are added up."""

    @staticmethod
    def forward(ctx: Any, active: Scope, x: Tensor, cut: _Cut) -> Tensor:
        ctx.shard, ctx.cut = active.shard, cut
        likes = [_shaped(x, d1=n) for n in _widths(cut.time)]
        return active.arrival(lambda: torch.cat(exchange.all_to_all(active.shard, [x] * len(likes), likes), dim=1))

    @staticmethod
    @first_order("sequence shard", ON_ONE_RANK)
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        parts = dy.split(_widths(ctx.cut.time), dim=1)
        own = parts[ctx.shard.rank]
        return None, torch.stack(exchange.all_to_all(ctx.shard, parts, [own] * len(parts))).sum(0), None


class _FromFirst(torch.autograd.Function):
    """The first rank's state (n, H, ...) -> every rank's own heads of it.

    An input is named so that the node has a gradient, and sends it, where the rank's own state needs none.
    """

    @staticmethod
    def forward(ctx: Any, active: Scope, state: Tensor, _: Tensor, cut: _Cut) -> Tensor:
        shard = active.shard
        ctx.shard, ctx.cut = shard, cut
        parts = state.split(_widths(cut.heads), dim=1)

        def bring() -> Tensor:
            others = {rank: parts[rank] for rank in range(1, shard.size)} if shard.rank == 0 else {}
            back = exchange.swap(shard, others, {} if shard.rank == 0 else {0: parts[shard.rank]}, "state")
            return back[0] if shard.rank else parts[0].clone()

        return active.arrival(bring)

    @staticmethod
    @first_order("sequence shard", ON_ONE_RANK)
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        shard, widths = ctx.shard, _widths(ctx.cut.heads)
        if shard.rank:
            exchange.swap(shard, {0: d}, {}, "state")
            return None, None, None, None
        likes = {rank: _shaped(d, d1=widths[rank]) for rank in range(1, shard.size)}
        back = exchange.swap(shard, {}, likes, "state")
        return None, torch.cat([d, *(back[rank] for rank in range(1, shard.size))], dim=1), None, None
