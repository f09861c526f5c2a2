"""Pictures cut into strips of rows: the edge of a strip goes from rank to rank, against one process."""

import itertools
from collections.abc import Callable
from unittest import mock

import torch
from sharded_cases import LAYOUTS, LENGTH, Errors, Slice, like, operator, summed, without
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.ops import grid_scan, shard
from zoo.ops.core import recompute
from zoo.ops.core.spec import relative_error
from zoo.ops.core.table import OPERATORS
from zoo.ops.shard import exchange

Check = Callable[[shard.SequenceShard], Errors]
SPEC, PLSTM_GRID = OPERATORS["grid_scan"], OPERATORS["plstm_grid"]


def leaves_of() -> dict[str, Tensor]:
    return {key: x.requires_grad_() for key, x in SPEC.without_state(SPEC.inputs(2, LENGTH)).items()}


def upward(place: shard.SequenceShard, cuts: tuple[int, ...] | None) -> Errors:
    """The recurrence from the last row to the first: edges come from the ranks below."""
    leaves = leaves_of() if cuts is None else {k: x.requires_grad_() for k, x in SPEC.inputs(1, LENGTH).items()}
    leaves.pop("state", None)

    def run(parts: dict[str, Tensor], bounds: tuple[int, ...] | None) -> Tensor:
        cu = None if bounds is None else torch.tensor(shard.mirrored(bounds))
        return grid_scan(**{key: x.flip(1) for key, x in parts.items()}, cu_seqlens=cu)[0].flip(1)

    whole = run(leaves, cuts)
    dy = like(whole, 1)
    exact = torch.autograd.grad((whole * dy).sum(), list(leaves.values()))
    here = Slice(place, LENGTH, cuts)
    own = None if here.cu is None else tuple(here.cu.tolist())
    if cuts is not None and own is not None:  # seen from below, a picture that ends at the bottom edge is followed by
        ends = here.right in cuts and here.right < LENGTH  # an empty one, and none comes first
        own = tuple(dict.fromkeys(own)) + ((own[-1],) if ends else ())
    with shard.use(place), shard.from_the_right():
        y = run({key: here.of(x) for key, x in leaves.items()}, own)
    parts = torch.autograd.grad((y * here.of(dy)).sum(), list(leaves.values()))
    errors = {"output": relative_error(y, here.of(whole))}
    for key, ours, want in zip(leaves, summed(place, parts), exact, strict=True):
        errors[f"d {key}"] = relative_error(ours, want)
    return errors


def in_blocks(place: shard.SequenceShard, groups: int, blocks: int) -> Errors:
    """By the number of micro-batches; every one is a message."""
    frontier = shard.frontier
    with (
        mock.patch.object(shard, "frontier", lambda *args: frontier(*args, groups=groups, blocks=blocks)),
        mock.patch.object(exchange, "send", wraps=exchange.send) as sent,
    ):
        errors = operator(place, SPEC, "batch")
    ends = (place.rank > 0) + (place.rank + 1 < place.size)
    return errors | {"messages": abs(sent.call_count - ends * min(groups, 2) * min(blocks, 9))}


def lost_gradient(place: shard.SequenceShard) -> Errors:
    """The negative control of the way back: every rank sends zeros for the gradient of the edge that it got."""
    send = exchange.send

    def silent(place: shard.SequenceShard, x: Tensor, peer: int, what: str) -> exchange.Pending:
        return send(place, x * 0 if peer < place.rank else x, peer, what)

    with mock.patch.object(exchange, "send", silent):
        return operator(place, SPEC, "batch", given=False)


def recomputed(place: shard.SequenceShard) -> Errors:
    """Gradients under activation checkpointing are those without it, and recomputation sends nothing."""
    leaves = leaves_of()
    here = Slice(place, LENGTH, None)
    runs: list[list[Tensor]] = []
    counts: list[int] = []
    for context_fn in (None, shard.checkpoint_contexts, recompute.contexts()):

        def block(*inputs: Tensor) -> Tensor:
            return grid_scan(*(x * 1.0 for x in inputs))[0]

        own, seen = [here.of(x) for x in leaves.values()], list[shard.Message]()
        with shard.observed(seen.append):
            with shard.use(place):
                y = (
                    block(*own)
                    if context_fn is None
                    else checkpoint(block, *own, use_reentrant=False, context_fn=context_fn)
                )
            runs.append([y, *torch.autograd.grad(y.sin().sum(), list(leaves.values()))])
        counts.append(len(seen))
    worst = max(relative_error(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    return {"numbers": worst, "messages": max(counts) - min(counts)}


def checks() -> dict[str, Check]:
    """For the suite "frontiers" of sharded.py."""
    made: dict[str, Check] = {}
    for layout, length, given in itertools.product(LAYOUTS, (LENGTH, 6, 3), (True, False)):  # no row on a rank at 3
        made[f"{layout}, {length}{'' if given else ', no state'}"] = lambda place, lay=layout, n=length, g=given: (
            operator(place, SPEC, lay, length=n, given=g)
        )
    for layout, length, given in itertools.product(LAYOUTS, (LENGTH, 3), (True, False)):
        made[f"plstm_grid, {layout}, {length}{'' if given else ', no state'}"] = (
            lambda place, lay=layout, n=length, g=given: operator(place, PLSTM_GRID, lay, length=n, given=g)
        )
    for layout, cuts in LAYOUTS.items():
        made[f"upward, {layout}"] = lambda place, c=cuts: upward(place, c)
    for groups, blocks in ((1, 1), (1, 9), (2, 1), (2, 4), (9, 99)):
        made[f"in {groups} x {blocks}"] = lambda place, g=groups, b=blocks: in_blocks(place, g, b)
    made["recomputed"] = recomputed
    made["dropped message of plstm_grid"] = lambda place: operator(
        place, PLSTM_GRID, "batch", given=False, within=without
    )
    made["dropped message"] = lambda place: operator(place, SPEC, "batch", given=False, within=without)
    made["lost gradient"] = lost_gradient
    return made
