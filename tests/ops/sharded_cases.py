"""What is checked on every rank when a sequence is cut across ranks; `sharded.py` starts the processes."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import zoo
from zoo.ops import fft_convolution, quasiseparable, shard
from zoo.ops.core.spec import Inputs, OperatorSpec, Sizes, relative_error
from zoo.ops.core.table import OPERATORS
from zoo.ops.shard.exchange import all_gather

LENGTH = 41  # no multiple of 2, 3 or 4: stretches are uneven
LAYOUTS: dict[str, tuple[int, ...] | None] = {
    "batch": None,
    "one long document": (0, 3, 36, 41),  # over all ranks, and with whole documents beside it
    "borders at edges": (0, 10, 13, 20, 27, 30, 41),  # a document begins at the left edge of some rank of 2, 3 and 4
}
SMALL = {"d_model": 16, "n_layers": 2, "n_heads": 2, "hidden_size": 24, "vocab_size": 11, "init_std": 0.3}
Errors = dict[str, float]
Within = Callable[[shard.SequenceShard], AbstractContextManager[None]]


class Slice:
    """What one rank holds: tokens [left, right), and, packed, the rows of its documents."""

    def __init__(self, place: shard.SequenceShard, length: int, cuts: tuple[int, ...] | None):
        self.place, self.cuts = place, cuts
        self.left, self.right = shard.stretch(length, place.rank, place.size)
        self.cu: Tensor | None = None
        self.rows: list[int] = []
        self.ended: list[int] = []  # local rows whose documents end here
        if cuts is not None:
            local = shard.local_boundaries(torch.tensor(cuts), place.rank, place.size, length)
            self.cu, self.rows = local.cu_seqlens, list(local.documents)
            self.ended = [i for i, d in enumerate(self.rows) if self.left < cuts[d + 1] <= self.right]

    def of(self, x: Tensor) -> Tensor:
        return x[:, self.left : self.right]

    def cut(self) -> Tensor | None:
        return None if self.cuts is None else torch.tensor(self.cuts)


def summed(place: shard.SequenceShard, gradients: Any) -> list[Tensor]:
    """Gradients of full-size leaves, added over the ranks."""
    if place.ranks is not None:
        return [torch.stack(all_gather(place, g)).sum(0) for g in gradients]
    total = [g.clone(memory_format=torch.contiguous_format) for g in gradients]
    for g in total:
        dist.all_reduce(g, group=place.group)
    return total


def like(x: Tensor, seed: int) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def remembering(inputs: Inputs) -> Inputs:
    """Decays near 1 and weak corrections, so that the past matters everywhere."""
    gentle = {"g": 0.02, "beta": 0.1}
    return {name: x * gentle[name] if name in gentle else x for name, x in inputs.items()}


def operator(
    place: shard.SequenceShard, spec: OperatorSpec, layout: str, backend: str = "torch", *, length: int = LENGTH,
    given: bool = True, sizes: Sizes | None = None, within: Within = shard.use,
) -> Errors:  # fmt: skip
    """Outputs, final states and all gradients of an operator against the run in one piece."""
    cuts = LAYOUTS[layout]
    if cuts is not None:
        cuts = tuple(dict.fromkeys(min(c, length) for c in cuts))
    inputs = remembering(spec.inputs(2 if cuts is None else 1, length, sizes, documents=cuts and len(cuts) - 1))
    given = given and bool(spec.state_names)
    if not given:
        inputs = spec.without_state(inputs)
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if x.is_floating_point()}
    here = Slice(place, length, cuts)

    outputs = spec.run(inputs, backend=backend, cu_seqlens=here.cut())
    y, after = outputs[0], spec.states_after(outputs)
    dy, dafter = like(y, 1), {name: like(x, 2) for name, x in after.items() if x.requires_grad}  # not counts, nor zeros
    whole = torch.autograd.grad(
        [y, *(after[name] for name in dafter)], list(leaves.values()), [dy, *dafter.values()],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip

    own = {name: here.of(x) if name in spec.time else x for name, x in inputs.items()}
    for name in spec.state_names if given else ():
        if cuts is not None:
            own[name] = inputs[name][here.rows]
        elif place.rank and name in leaves:
            own[name] = torch.full_like(inputs[name], torch.nan)  # the past is what earlier ranks send
    with within(place):
        outputs = spec.run(own, backend=backend, cu_seqlens=here.cu)
    y_, after_ = outputs[0], spec.states_after(outputs)
    loss = (y_ * here.of(dy)).sum()
    errors = {"output": relative_error(y_, here.of(y))}
    rows = [here.rows[i] for i in here.ended]
    last = place.rank == place.size - 1
    for name in after if (rows if cuts is not None else last) else ():
        ends, exact = (after_[name], after[name]) if cuts is None else (after_[name][here.ended], after[name][rows])
        errors[name] = relative_error(ends, exact)
        if name in dafter:
            loss = loss + (ends * (dafter[name] if cuts is None else dafter[name][rows])).sum()
    parts = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    for name, ours, exact in zip(leaves, summed(place, parts), whole, strict=True):
        errors[f"d {name}"] = relative_error(ours, exact)
    return errors


def model(
    place: shard.SequenceShard, name: str, layout: str, *, recompute: bool = False,
    within: Within = shard.use, **fields: Any,
) -> Errors:  # fmt: skip
    """Logits, final states and parameter gradients of a whole model. The backward runs outside the `with`."""
    torch.manual_seed(0)
    net = zoo.create_model(
        name, activation_checkpointing=recompute, **(SMALL | fields)
    ).double()  # fmt: skip
    cuts = LAYOUTS[layout]
    here = Slice(place, LENGTH, cuts)
    tokens = torch.randint(11, (2 if cuts is None else 1, LENGTH))
    logits, state = net(tokens, cu_seqlens=here.cut())
    upstream = like(logits, 1)
    whole = torch.autograd.grad((logits * upstream).sum(), list(net.parameters()))
    with within(place):
        logits_, state_ = net(here.of(tokens), cu_seqlens=here.cu)
    parts = torch.autograd.grad((logits_ * here.of(upstream)).sum(), list(net.parameters()))
    errors = {"logits": relative_error(logits_, here.of(logits))}
    if place.rank == place.size - 1:
        errors["state"] = max(relative_error(a.memory[-1], b.memory[-1]) for a, b in zip(state_, state, strict=True))
    for (key, _), ours, exact in zip(net.named_parameters(), summed(place, parts), whole, strict=True):
        errors[f"d {key}"] = relative_error(ours, exact)
    return errors


def recomputation_sends_nothing(place: shard.SequenceShard) -> Errors:
    """The difference in the number of exchanges between a run with activation checkpointing and one without."""
    counts = []
    for recompute in (False, True):
        seen: list[shard.Message] = []
        with shard.observed(seen.append):
            model(place, "deltanet", "batch", recompute=recompute)
        counts.append(len(seen))
    assert place.size == 1 or counts[0] > 0
    return {"exchanges": abs(counts[1] - counts[0])}


KNOWN = ("cannot be cut across ranks", "must be one of", "ranks must be different ones of the group's")


def refusals(place: shard.SequenceShard) -> Errors:
    """What cannot be cut says so."""
    net = zoo.create_model("deltanet", d_model=16, n_layers=1, vocab_size=11)
    silent, x = 0, torch.zeros(1, 4, 2)
    for call in (
        lambda: fft_convolution(x, x.new_ones(2, 3)),
        lambda: quasiseparable(**OPERATORS["quasiseparable"].inputs(1, 4), backend="reference"),
        lambda: net(torch.zeros(1, 4, dtype=torch.long), mask=torch.ones(1, 4)),
        lambda: shard.SequenceShard(place.group, method="pigeon"),
        lambda: shard.SequenceShard(place.group, ranks=(place.rank, place.rank)),
        lambda: shard.SequenceShard(place.group, ranks=(place.size,)),
    ):
        with shard.use(place):
            try:
                call()
            except ValueError as error:
                silent += not any(word in str(error) for word in KNOWN)
            else:
                silent += 1
    return {"silent": silent}


def without(place: shard.SequenceShard) -> AbstractContextManager[None]:
    """The negative control: every rank runs as if its stretch were the whole sequence."""
    return nullcontext()
