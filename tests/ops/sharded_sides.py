"""What sees both sides of every token: what comes from the right is needed, and what is sent is what is promised."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
from sharded_cases import Errors, operator
from torch import Tensor

from zoo.ops import shard, ssd
from zoo.ops.core.spec import relative_error
from zoo.ops.core.table import OPERATORS
from zoo.ops.shard import exchange

halo = importlib.import_module("zoo.ops.shard.halo")  # the package has a function of this name
Check = Callable[[shard.SequenceShard], Errors]


@contextmanager
def without_rows_from_the_right(place: shard.SequenceShard) -> Iterator[None]:
    """Every rank takes zeros for the rows after its stretch."""
    with shard.use(place), mock.patch.object(halo, "from_the_right", return_value=shard.use(None)):
        yield


@contextmanager
def without_states_from_the_right(place: shard.SequenceShard) -> Iterator[None]:
    """Every rank takes zeros for the state after its stretch."""
    whole = shard.incoming_states

    def left_alone(elements: tuple[Tensor, Tensor], states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        left, right = whole(elements, states)
        return left, right * 0

    with shard.use(place), mock.patch.object(shard, "incoming_states", left_alone):
        yield


def any_operator_from_the_right(place: shard.SequenceShard) -> Errors:
    """`ssd` over a flipped stretch: the state comes from the last rank, by every method that sends states."""
    leaves = {key: x.requires_grad_() for key, x in OPERATORS["ssd"].inputs(2, 23).items() if key != "state"}
    flipped = {key: x.flip(1) if key in OPERATORS["ssd"].time else x for key, x in leaves.items()}
    whole = ssd(**flipped)[0].flip(1)
    left, right = shard.stretch(23, place.rank, place.size)
    errors: Errors = {}
    for method in ("allgather", "lasp", "lasp2", "zeco"):
        own = {key: x[:, left:right].flip(1) if key in OPERATORS["ssd"].time else x for key, x in leaves.items()}
        with shard.use(replace(place, method=method)), shard.from_the_right():
            y = ssd(**own)[0].flip(1)
        errors[f"output, {method}"] = relative_error(y, whole[:, left:right])
    return errors


def views(place: shard.SequenceShard) -> Errors:
    """A reversed place names its ranks from the right, and twice reversed it is itself."""
    back = place.reversed()
    wrong = back.rank != place.size - 1 - place.rank or back.reversed() != place
    seen = exchange.all_gather(back, torch.tensor([back.rank]))
    wrong |= [int(x) for x in seen] != list(range(place.size))
    if place.size > 1:
        try:
            shard.positions(back, 3)
        except ValueError as error:
            wrong |= "positions are those of time run forward; got a reversed place" not in str(error)
        else:
            wrong = True
    return {"wrong": float(wrong)}


def bytes_of_both_sides(place: shard.SequenceShard, method: str) -> Errors:
    """What a rank receives, forward and backward, less a state and a token's C from each side; the hops of chains, both
    ways in those of one."""
    spec = OPERATORS["quasiseparable"]
    inputs = {key: x.requires_grad_() for key, x in spec.inputs(2, 4 * place.size).items()}
    left, right = 4 * place.rank, 4 * place.rank + 4
    own = {key: x[:, left:right] if key in spec.time else x for key, x in inputs.items()}
    _, _, H, P = inputs["x"].shape
    G, N = inputs["B"].shape[3:]
    state, transition, read = 2 * H * N * P * 8, 2 * H * 8, 2 * G * N * 8
    neighbours, others = (place.rank > 0) + (place.rank + 1 < place.size), place.size - 1
    gathered = others * 2 * (state + transition)
    both = {
        "allgather": (gathered, gathered), "lasp2": (gathered, others * 2 * state),
        "lasp": (neighbours * state, neighbours * state), "zeco": (neighbours * state, neighbours * state),
    }[method]  # fmt: skip
    seen: list[shard.Message] = []
    with shard.observed(seen.append), mock.patch.object(exchange, "meet", wraps=exchange.meet) as meet:
        with shard.use(replace(place, method=method, blocks=3)):
            (y,) = spec.run(own)
        hops = meet.call_count - 2 * (place.size > 1)  # two meetings for C
        forward = sum(m.received for m in seen)
        y.sum().backward()
    backward = sum(m.received for m in seen) - forward
    expected = {"lasp": place.size - 1, "zeco": place.size + 1}.get(method, 0) if place.size > 1 else 0
    return {
        "hops": abs(hops - expected),
        "forward": abs(forward - both[0] - neighbours * read),
        "backward": abs(backward - both[1] - neighbours * read),
    }


def checks() -> dict[str, Check]:
    made: dict[str, Check] = {"reversed": views, "ssd from the right": any_operator_from_the_right}
    for name, within in (
        ("depthwise_conv1d", without_rows_from_the_right),
        ("quasiseparable", without_states_from_the_right),
    ):
        made[f"dropped right of {name}"] = lambda place, n=name, w=within: operator(
            place, OPERATORS[n], "batch", within=w
        )
    for method in ("allgather", "lasp", "lasp2", "zeco"):
        made[f"bytes, quasiseparable, {method}"] = lambda place, m=method: bytes_of_both_sides(place, m)
    return made
