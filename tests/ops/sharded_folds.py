"""Folds over ranks: states that are trees, joined by a rule that is a function, against one process."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import running_average
import torch
from sharded_cases import LAYOUTS, LENGTH, Errors, Slice, operator, summed, without
from torch.utils.checkpoint import checkpoint

from zoo.ops import shard
from zoo.ops.core import recompute
from zoo.ops.core.spec import relative_error
from zoo.ops.shard import fold

Check = Callable[[shard.SequenceShard], Errors]
SPEC = running_average.SPEC


def lost_gradient(place: shard.SequenceShard, method: str) -> Errors:
    """The negative control of the way back: what comes back from later ranks is lost, and what arrives is right."""
    whole = fold._through

    def alone(rule, several, element, Z, dZ, G):  # type: ignore[no-untyped-def]
        return whole(rule, several, element, Z, dZ, [0 * g for g in G])

    with mock.patch.object(fold, "_through", alone):
        return operator(replace(place, method=method), SPEC, "batch", given=False)


def last_state_alone(place: shard.SequenceShard, method: str) -> Errors:
    """A loss of the last state on the last rank; the others' outputs times 0, where only v has a gradient."""
    leaves = {key: x.requires_grad_() for key, x in SPEC.without_state(SPEC.inputs(2, LENGTH)).items()}
    whole = torch.autograd.grad(SPEC.run(leaves)[3].square().sum(), leaves["v"])[0]
    here = Slice(place, LENGTH, None)
    own = {key: here.of(x) for key, x in leaves.items()}
    last = place.rank + 1 == place.size
    if not last:
        own["s"] = own["s"].detach()
    with shard.use(replace(place, method=method)):
        y, _, _, w, _ = SPEC.run(own)
    loss = w.square().sum() if last else (0 * y).sum()
    (ours,) = summed(place, torch.autograd.grad(loss, [leaves["v"]]))
    return {"d v": relative_error(ours, whole)}


def recomputed(place: shard.SequenceShard, method: str) -> Errors:
    """Gradients under activation checkpointing are those without it, and recomputation sends nothing."""
    leaves = {key: x.requires_grad_() for key, x in SPEC.without_state(SPEC.inputs(2, LENGTH)).items()}
    here = Slice(place, LENGTH, None)
    runs: list[list[torch.Tensor]] = []
    counts: list[int] = []
    for again in (False, True):
        seen: list[shard.Message] = []

        def block(s: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return SPEC.run({"s": s * 1.0, "v": v * 1.0})[0]

        own = [here.of(leaves[key]) for key in ("s", "v")]
        with shard.observed(seen.append):
            with shard.use(replace(place, method=method)):
                y = (
                    checkpoint(block, *own, use_reentrant=False, context_fn=recompute.contexts())
                    if again
                    else block(*own)
                )
            runs.append([y, *torch.autograd.grad(y.sin().sum(), list(leaves.values()))])
        counts.append(len(seen))
    worst = max(relative_error(a, b) for a, b in zip(*runs, strict=True))
    return {"numbers": worst, "messages": abs(counts[1] - counts[0])}


def bytes_of_a_fold(place: shard.SequenceShard, method: str) -> Errors:
    """What a rank receives forward and backward, less what the table of ops/shard/fold.py says."""
    inputs = {key: x.requires_grad_() for key, x in SPEC.without_state(SPEC.inputs(2, 4 * place.size)).items()}
    here = Slice(place, 4 * place.size, None)
    seen: list[shard.Message] = []
    with shard.observed(seen.append):
        with shard.use(replace(place, method=method)):
            y = SPEC.run({key: here.of(x) for key, x in inputs.items()})[0]
        forward = sum(m.received for m in seen)
        y.sum().backward()
    backward = sum(m.received for m in seen) - forward
    floating = 2 * 2 * (1 + 1 + 3) * 8  # m, u and w of 2 rows and 2 heads
    element, others = floating + 2 * 8, place.size - 1  # and the count of tokens
    expected = {
        "allgather": (others * (element + 1), others * (element + floating + 1)),
        "lasp": (element * (place.rank > 0), floating * (place.rank < others)),
    }[method]
    return {"forward": abs(forward - expected[0]), "backward": abs(backward - expected[1])}


def checks() -> dict[str, Check]:
    """For the suite "folds" of sharded.py."""
    made: dict[str, Check] = {}
    for method, layout in itertools.product(("allgather", "lasp", "lasp2", "zeco"), LAYOUTS):
        for length, given in itertools.product((LENGTH, 6, 3), (True, False)):  # ranks without a token at 3
            made[f"{method}, {layout}, {length}{'' if given else ', no state'}"] = (
                lambda place, m=method, lay=layout, n=length, g=given: operator(
                    replace(place, method=m), SPEC, lay, length=n, given=g
                )
            )
        made[f"{method}, {layout}, reference"] = lambda place, m=method, lay=layout: operator(
            replace(place, method=m), SPEC, lay, "reference"
        )
    for method in ("allgather", "lasp"):
        made[f"{method}, last state alone"] = lambda place, m=method: last_state_alone(place, m)
        made[f"{method}, recomputed"] = lambda place, m=method: recomputed(place, m)
        made[f"{method}, bytes"] = lambda place, m=method: bytes_of_a_fold(place, m)
        made[f"dropped message, {method}"] = lambda place, m=method: operator(
            replace(place, method=m), SPEC, "batch", given=False, within=without
        )
        made[f"lost gradient, {method}"] = lambda place, m=method: lost_gradient(place, m)
    return made
