"""Every way for a state to cross ranks: the same numbers as one process, and the bytes that its table promises."""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from sharded_cases import LAYOUTS, LENGTH, SMALL, Errors, Slice, like, model, operator, summed, without
from torch import Tensor

from zoo.ops import shard
from zoo.ops.core.spec import OperatorSpec, Sizes, relative_error
from zoo.ops.core.table import OPERATORS
from zoo.ops.linear_attention.delta_rule import across, chunked

Check = Callable[[shard.SequenceShard], Errors]
WAYS: dict[str, dict[str, Any]] = {
    "lasp": {"method": "lasp"},
    "lasp2": {"method": "lasp2"},
    "zeco": {"method": "zeco", "blocks": 3},
    "zeco, one column a block": {"method": "zeco", "blocks": 1000},
    "heads": {"method": "heads"},
}
MANY_HEADS = {"H": 6, "G": 3, "E": 6}  # at least one a rank, and groups that borders cut


def sizes_for(spec: OperatorSpec) -> Sizes:
    return {name: MANY_HEADS.get(name, size) for name, size in spec.sizes[0].items()}


def placed(place: shard.SequenceShard, layout: str, **way: Any) -> shard.SequenceShard:
    return replace(place, length=LENGTH, documents=LAYOUTS[layout], **way)


def crossing(spec: OperatorSpec, way: str, layout: str) -> Check:
    """An operator by one method; heads take an initial state from a batch only."""
    given = layout == "batch" or way != "heads"
    return lambda place: operator(
        placed(place, layout, **WAYS[way]), spec, layout, sizes=sizes_for(spec), given=given
    )  # fmt: skip


# -- the delta rule, which prepares its stretch once ------------------------------------------------------------------


def in_ranges(place: shard.SequenceShard, name: str, layout: str) -> Errors:
    """Several chunks a rank, and one chunk position at a time."""
    with mock.patch.object(chunked, "CHUNK", 4), mock.patch.object(across, "SEGMENT", 1):
        return operator(place, OPERATORS[name], layout)


def last_state_alone(place: shard.SequenceShard) -> Errors:
    """A loss of the last state on the last rank; of an output times 0 on the others, where only v has a gradient."""
    spec = OPERATORS["gated_delta_rule"]
    leaves = {key: x.requires_grad_() for key, x in spec.inputs(2, LENGTH).items() if key != "state"}
    _, after = spec.run(leaves)
    whole = torch.autograd.grad(after.square().sum(), leaves["v"])[0]
    here = Slice(place, LENGTH, None)
    own = {key: here.of(x) for key, x in leaves.items()}
    if place.rank + 1 < place.size:
        own = {key: x if key == "v" else x.detach() for key, x in own.items()}
    with shard.use(place):
        y, after = spec.run(own)
    loss = after.square().sum() if place.rank + 1 == place.size else (0 * y).sum()
    (ours,) = summed(place, torch.autograd.grad(loss, [leaves["v"]]))
    return {"d v": relative_error(ours, whole)}


def prepared_once(place: shard.SequenceShard) -> Errors:
    """Forward, backward and recomputation prepare once each; elements are made between neighbours, and not again."""
    wrong = 0
    for recompute in (False, True):
        with (
            mock.patch.object(across, "keys", wraps=across.keys) as keys,
            mock.patch.object(across, "run_wide", wraps=across.run_wide) as elements,
            mock.patch.object(across, "pull_back", wraps=across.pull_back) as pulls,
        ):
            model(place, "deltanet", "batch", recompute=recompute)
        between = 0 < place.rank < place.size - 1
        layers = SMALL["n_layers"] if place.size > 1 else 0
        wrong += keys.call_count != (2 + recompute) * layers
        wrong += elements.call_count != between * layers
        wrong += pulls.call_count != between * layers
    return {"calls": wrong}


# -- a nonlinear memory -----------------------------------------------------------------------------------------------


def tanh_memory(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = tanh(1.1 h_{t-1} + x_t): no summary of a stretch replaces running it."""
    outputs = []
    for x_t in x.unbind(1):
        state = torch.tanh(1.1 * state + x_t)
        outputs.append(state)
    return torch.stack(outputs, dim=1) if outputs else x, state


def in_groups(place: shard.SequenceShard, groups: int | None = None, within: Any = shard.use) -> Errors:
    """`serial` against one run, with gradients through outputs and the last state."""
    generator = torch.Generator().manual_seed(0)
    x = (0.3 * torch.randn(5, LENGTH, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    start = torch.randn(5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    y, last = tanh_memory(x, start)
    dy, dlast = like(y, 1), like(last, 2)
    whole = torch.autograd.grad((y * dy).sum() + (last * dlast).sum(), (x, start))
    here = Slice(place, LENGTH, None)
    before = start if place.rank == 0 else torch.full_like(start, torch.nan if within is shard.use else 0.0)
    with within(place):
        y_, last_ = shard.serial(tanh_memory, [here.of(x)], before, groups=groups)
    loss = (y_ * here.of(dy)).sum()
    if place.rank == place.size - 1:
        loss = loss + (last_ * dlast).sum()
    parts = torch.autograd.grad(loss, (x, start), allow_unused=True, materialize_grads=True)
    errors = {"output": relative_error(y_, here.of(y))}
    for name, ours, exact in zip(("d x", "d start"), summed(place, parts), whole, strict=True):
        errors[name] = relative_error(ours, exact)
    return errors


def nonlinear(name: str, spec: OperatorSpec) -> dict[str, Check]:
    """An operator whose state is handed on: sequences as micro-batches, heads as micro-batches, ranks without a token;
    and by slices of heads."""
    many = sizes_for(spec)
    made: dict[str, Check] = {f"{name}, heads, batch": crossing(spec, "heads", "batch")}
    made[f"{name}, heads, documents"] = crossing(spec, "heads", "borders at edges")
    made[f"{name}, sequences"] = lambda place: operator(placed(place, "batch"), spec, "batch")
    for layout in LAYOUTS:
        made[f"{name}, {layout}"] = lambda place, lay=layout: operator(placed(place, lay), spec, lay, sizes=many)
        made[f"{name}, {layout}, no state"] = lambda place, lay=layout: operator(
            placed(place, lay), spec, lay, sizes=many, given=False
        )
        made[f"{name}, {layout}, 3"] = lambda place, lay=layout: operator(place, spec, lay, length=3)
    made[f"{name}, reference"] = lambda place: operator(place, spec, "one long document", "reference")
    made[f"dropped {name}"] = lambda place: operator(place, spec, "batch", given=False, within=without)
    return made


# -- bytes ------------------------------------------------------------------------------------------------------------


def bytes_of_states(place: shard.SequenceShard, name: str, method: str) -> Errors:
    """What a rank receives forward and backward, less what the table of ops/shard/prefix_scan.py says."""
    spec = OPERATORS[name]
    inputs = {key: x.requires_grad_() for key, x in spec.inputs(2, 4 * place.size).items()}
    here = Slice(place, 4 * place.size, None)
    own = {key: here.of(x) if key in spec.time else x for key, x in inputs.items()}
    element = spec.summary({key: x for key, x in own.items() if key != "state"}, None)  # type: ignore[misc]
    state, transition = element.b.nbytes, element[0].nbytes
    both = [0, 0]
    for i, seen in enumerate(([], [])):
        received: list[shard.Message] = seen
        with shard.observed(received.append):
            if i == 0:
                with shard.use(replace(place, method=method, blocks=3)):
                    y, _ = spec.run(own)
            else:
                y.sum().backward()
        both[i] = sum(message.received for message in received)
    others = place.size - 1
    gathered = others * (state + transition)
    one = state if place.rank else 0, state if place.rank < others else 0
    expected = {
        "allgather": (gathered, gathered), "lasp2": (gathered, others * state), "lasp": one, "zeco": one
    }[method]  # fmt: skip
    return {"forward": abs(both[0] - expected[0]), "backward": abs(both[1] - expected[1])}


def bytes_of_heads(place: shard.SequenceShard) -> Errors:
    """(P - 1) / P of q, k, v, g and of the output each way, and the last state's heads to everyone."""
    B, L, H, K = 2, 3, 12, 4
    q, k, v, g = (torch.zeros(B, L, H, K, dtype=torch.float64, requires_grad=True) for _ in range(4))
    seen: list[shard.Message] = []
    counts = []
    with shard.observed(seen.append):
        with shard.use(replace(place, method="heads")):
            y, _ = OPERATORS["gated_linear_attention"].function(q, k, v, g)
        counts.append(sum(m.received for m in seen))
        y.sum().backward()
        counts.append(sum(m.received for m in seen) - counts[0])
    share = (place.size - 1) / place.size
    activations, state = 5 * share * B * L * H * K * 8, share * B * H * K * K * 8
    if place.size == 1:
        return {"forward": counts[0], "backward": counts[1]}
    # the state's gradient, zeros here, is sent as well: autograd fills in what nobody asked for
    return {"forward": abs(counts[0] - activations - state), "backward": abs(counts[1] - activations - state)}


def bytes_of_halo(place: shard.SequenceShard) -> Errors:
    """B (W - 1) D numbers from the left, and their gradient from the right."""
    x, weight = torch.zeros(2, 6, 5, dtype=torch.float64, requires_grad=True), torch.zeros(5, 4, dtype=torch.float64)
    seen: list[shard.Message] = []
    with shard.observed(seen.append):
        with shard.use(place):
            y, _ = OPERATORS["causal_conv1d"].function(x, weight)
        forward = sum(m.received for m in seen)
        y.sum().backward()
    backward = sum(m.received for m in seen) - forward
    size = 2 * 3 * 5 * 8
    return {
        "forward": abs(forward - size * (place.rank > 0)),
        "backward": abs(backward - size * (place.rank < place.size - 1)),
    }


def refuses_other_layouts(place: shard.SequenceShard) -> Errors:
    """A state cannot enter a stretch that is in two pieces."""
    silent = 0
    if place.size > 1:
        inputs = OPERATORS["delta_rule"].inputs(1, 8)
        for name, words in (("zigzag", "one contiguous stretch of time"), ("striped", "one contiguous stretch")):
            with shard.use(replace(place, attention=name, layout=None)):
                try:
                    OPERATORS["delta_rule"].run(inputs)
                except ValueError as error:
                    silent += words not in str(error)
                else:
                    silent += 1
    return {"silent": silent}


def residual(name: str, method: str) -> Check:
    """How far one Newton step is from the recurrence: seen whole at the borders of ranks, and over all heads."""
    spec = OPERATORS[name]

    def run(place: shard.SequenceShard) -> Errors:
        inputs, more = spec.inputs(2, LENGTH), {"iterations": 1, "return_residual": True}
        del inputs["state"]
        whole = spec.function(**inputs, **more)[2]
        place = placed(place, "batch", method=method)
        here = Slice(place, LENGTH, None)
        with shard.use(place):
            found = spec.function(**{key: here.of(x) if x.ndim > 2 else x for key, x in inputs.items()}, **more)[2]
        return {"residual": relative_error(found, whole)}

    return run


def walked(method: str, layout: str) -> Check:
    """A recurrence that Newton's method does not solve is walked, rank after rank."""
    spec = OPERATORS["para_gru"]
    expanding = replace(spec, make=lambda *args: spec.make(*args) | {"a": 2 * spec.make(*args)["a"]})

    def run(place: shard.SequenceShard) -> Errors:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "para_gru: Newton's method does not solve")
            return operator(placed(place, layout, method=method), expanding, layout)

    return run


def checks() -> dict[str, Check]:
    made: dict[str, Check] = {}
    affine = {
        n: s
        for n, s in OPERATORS.items()
        if s.cp_kind == "affine" and (s.summary is not None or s.iterated or s.both_sides)
    }
    for (name, spec), way in itertools.product(affine.items(), WAYS):
        if way == "heads" and not hasattr(getattr(spec.function, "func", spec.function), "over_heads"):
            continue
        for layout in ["batch"] if "column" in way else LAYOUTS:
            made[f"{name}, {way}, {layout}"] = crossing(spec, way, layout)
    for way in WAYS:
        if way != "heads":
            made[f"model gated_deltanet, {way}, recomputed"] = lambda place, w=way: model(
                placed(place, "one long document", **WAYS[w]), "gated_deltanet", "one long document", recompute=True
            )
    made["model gla, heads, recomputed"] = lambda place: model(
        placed(place, "batch", method="heads"), "gla", "batch", recompute=True, n_heads=4
    )
    for name, method in itertools.product(("para_gru", "para_lstm"), ("zeco", "allgather", "heads")):
        made[f"{name}, {method}, residual"] = residual(name, method)
    for name, spec in OPERATORS.items():
        if spec.cp_kind == "serial":
            made |= nonlinear(name, spec)
    for name, layout in itertools.product(("delta_rule", "gated_delta_rule"), LAYOUTS):
        made[f"{name} in ranges, {layout}"] = lambda place, n=name, lay=layout: in_ranges(place, n, lay)
    made["delta_rule, last state alone"] = last_state_alone
    made["delta_rule prepared once"] = prepared_once
    made["serial"] = in_groups
    made["serial, row by row"] = lambda place: in_groups(place, 5)
    made["serial, in one"] = lambda place: in_groups(place, 1)
    made["dropped serial"] = lambda place: in_groups(place, within=lambda _: shard.use(None))
    for method in ("allgather", "lasp", "zeco"):
        for layout in LAYOUTS:
            made[f"walked newton_scan, {method}, {layout}"] = walked(method, layout)
    summed_up = [name for name, spec in affine.items() if spec.summary is not None]
    for name, method in itertools.product(summed_up, ("allgather", "lasp", "lasp2", "zeco")):
        made[f"bytes, {name}, {method}"] = lambda place, n=name, m=method: bytes_of_states(place, n, m)
    made["bytes, heads"] = bytes_of_heads
    made["bytes, halo"] = bytes_of_halo
    made["layouts"] = refuses_other_layouts
    return made
