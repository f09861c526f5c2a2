"""Memories whose time is cut across ranks, against one process."""

from collections.abc import Callable
from dataclasses import replace

import torch
from sharded_cases import LAYOUTS, LENGTH, Errors, Slice, operator, summed, without
from torch.utils.checkpoint import checkpoint

from zoo.ops import shard
from zoo.ops.core import recompute
from zoo.ops.core.spec import relative_error
from zoo.ops.core.table import OPERATORS

Check = Callable[[shard.SequenceShard], Errors]
SPECS = {name: spec for name, spec in OPERATORS.items() if name.startswith("test_time_memory")}


def by_heads(place: shard.SequenceShard, name: str, layout: str) -> Errors:
    """Slices of time become slices of heads; packed documents are what the shard knows."""
    if place.size > 2:  # two heads
        return {"refused": 0.0}
    spec, cuts = SPECS[name], LAYOUTS[layout]
    inputs = spec.inputs(2 if cuts is None else 1, LENGTH, documents=cuts and len(cuts) - 1)
    if cuts is not None:
        inputs = spec.without_state(inputs)  # beside documents the method takes no state
    leaves = {key: x.requires_grad_() for key, x in inputs.items() if x.is_floating_point()}
    here = Slice(place, LENGTH, cuts)
    y, *_ = spec.run(inputs, cu_seqlens=here.cut())
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = torch.autograd.grad(y, list(leaves.values()), upstream, allow_unused=True, materialize_grads=True)
    own = {key: here.of(x) if key in spec.time else x for key, x in inputs.items()}
    with shard.use(replace(place, method="heads", length=LENGTH, documents=cuts)):
        y_, *_ = spec.run(own, cu_seqlens=here.cu)
    parts = torch.autograd.grad(y_, list(leaves.values()), here.of(upstream), allow_unused=True, materialize_grads=True)
    ours = summed(place, parts)
    errors = {"output": relative_error(y_, here.of(y))}
    return errors | {f"d {key}": relative_error(a, b) for key, a, b in zip(leaves, ours, whole, strict=True)}


def recomputed(place: shard.SequenceShard) -> Errors:
    """Gradients under activation checkpointing are those without it, and recomputation sends nothing."""
    spec = SPECS["test_time_memory_titans"]
    leaves = {key: x.requires_grad_() for key, x in spec.without_state(spec.inputs(2, LENGTH)).items()}
    leaves = {key: x for key, x in leaves.items() if key not in ("gain", "offset")}
    here = Slice(place, LENGTH, None)
    runs: list[list[torch.Tensor]] = []
    counts: list[int] = []
    for again in (False, True):
        seen: list[shard.Message] = []

        def block(*xs: torch.Tensor) -> torch.Tensor:
            return spec.run({key: x * 1.0 for key, x in zip(leaves, xs, strict=True)})[0]

        own = [here.of(x) if key in spec.time else x for key, x in leaves.items()]
        with shard.observed(seen.append):
            with shard.use(place):
                y = (
                    checkpoint(block, *own, use_reentrant=False, context_fn=recompute.contexts())
                    if again
                    else block(*own)
                )
            runs.append([y, *torch.autograd.grad(y.sin().sum(), list(leaves.values()))])
        counts.append(len(seen))
    worst = max(relative_error(a, b) for a, b in zip(*runs, strict=True))
    return {"numbers": worst, "messages": abs(counts[1] - counts[0])}


def checks() -> dict[str, Check]:
    """Names that start with "dropped" must fail on more than one rank."""
    made: dict[str, Check] = {}
    for name, spec in SPECS.items():
        for layout in LAYOUTS:
            for length, given in ((LENGTH, True), (LENGTH, False), (6, True), (3, True)):  # ranks without a token at 3
                made[f"{name}, {layout}, {length}{'' if given else ', no state'}"] = (
                    lambda place, s=spec, lay=layout, n=length, g=given: operator(place, s, lay, length=n, given=g)
                )
        made[f"{name}, reference"] = lambda place, s=spec: operator(place, s, "one long document", "reference")
        made[f"dropped {name}"] = lambda place, s=spec: operator(
            place, s, "batch", within=without, given=s.name != "test_time_memory_matrix"
        )
        for layout in ("batch", "one long document"):
            made[f"{name}, {layout}, heads"] = lambda place, n=name, lay=layout: by_heads(place, n, lay)
    made["recomputed"] = recomputed
    return made
