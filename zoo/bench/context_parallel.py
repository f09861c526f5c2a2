"""What a step costs when time is cut across many ranks: exact bytes, a measured local step, a link, no cluster.

The messages come from the model itself: it runs on a few tokens as the middle rank of a process group that is not
there (torch's "fake" backend) and every exchange is counted. States and halos do not depend on the number of tokens.
What a message costs is a model, `zoo.ops.shard.Link`. Nothing is taken to be hidden behind computation: an operator
sends its stretch's summary before it makes its outputs, and waits.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore  # the only home of the "fake" backend

from zoo.errors import UserError
from zoo.layers.model import as_model
from zoo.ops.shard import Link, Message, SequenceShard, observed, use

__all__ = [
    "STATES", "Exchange", "Prediction", "Traffic", "exchanges_of", "local_seconds", "predict", "predict_model",
    "seconds_of",
]  # fmt: skip

STATES = ("allgather", "lasp2", "lasp", "zeco")  # methods that move states, and so cost the same at any length


@dataclass(frozen=True)
class Exchange:
    """One exchange of a state: its bytes as a rank receives them, whole, and in how many blocks."""

    method: str
    received: int
    blocks: int = 1


@dataclass
class Traffic:
    """What the middle rank of P receives in one step, forward and backward.

    Attributes:
        states: the exchanges of states.
        halos: bytes of each message of a convolution's halo.
    """

    states: list[Exchange] = field(default_factory=list)
    halos: list[int] = field(default_factory=list)

    @property
    def received(self) -> int:
        """Bytes that the middle rank receives in one step, by states and halos together."""
        return sum(exchange.received for exchange in self.states) + sum(self.halos)


@contextmanager
def pretended(ranks: int) -> Iterator[None]:
    """This process as the middle one of `ranks` that do not exist; what it receives is uninitialised."""
    if dist.is_initialized():
        raise UserError("zoo bench cp needs a process without a process group; run it by itself, not under torchrun")
    dist.init_process_group("fake", rank=ranks // 2, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def exchanges_of(model: nn.Module, ranks: int, method: str, link: Link | None = None) -> Traffic:
    """Count what one training step of a token model sends.

    Args:
        model: a Model whose outputs are one tensor.
        ranks: P.
        method: one of STATES.
        link: by which "zeco" chooses its number of blocks.
    """
    if ranks == 1:
        return Traffic()
    messages = _messages(model, ranks, method, link)
    halos = [m.received for m in messages if m.what == "halo" and m.received]
    states = _states(messages, ranks)
    if method != "zeco":
        return Traffic([Exchange(method, size) for size in states], halos)
    whole = _states(_messages(model, ranks, "lasp", link), ranks)
    return Traffic([Exchange(method, size, n) for size, n in zip(whole, _blocks(whole, states), strict=True)], halos)


def _blocks(whole: Sequence[int], parts: Sequence[int]) -> list[int]:
    """In how many parts each state came: the same states in the same order, neighbours of one size in like parts.

    Those from both sides arrive mixed, so states are told apart by the sum of all neighbours of one size.
    """
    blocks: list[int] = []
    rest = iter(parts)
    for size, alike in groupby(whole):
        states, count, arrived = len(list(alike)), 0, 0
        while arrived < states * size:
            count, arrived = count + 1, arrived + next(rest)
        blocks += [count // states] * states
    return blocks


def _states(messages: Sequence[Message], ranks: int) -> list[int]:
    """Bytes of the states that arrive; of two ranks each receives one way and sends the other."""
    sizes = [m.received or (m.sent if ranks == 2 else 0) for m in messages if m.what == "state"]
    return [size for size in sizes if size]


def _messages(model: nn.Module, ranks: int, method: str, link: Link | None) -> list[Message]:
    seen: list[Message] = []
    batch = as_model(model).example(1, 8)
    with pretended(ranks), observed(seen.append):
        with use(SequenceShard(method=method, link=link or Link())):
            outputs, _ = model(**batch)
        outputs.sum().backward()
    model.zero_grad(set_to_none=True)
    return seen


def seconds_of(exchange: Exchange, ranks: int, link: Link) -> float:
    """The time of one exchange until the last rank has its state.

    A chain passes P - 1 states one after the other; in b blocks it takes P - 2 + b of their turns. A ring's all-gather
    brings all bytes through one link, and its latency grows with the logarithm of P.
    """
    if ranks == 1:
        return 0.0
    if exchange.method in ("allgather", "lasp2"):
        return math.ceil(math.log2(ranks)) * link.latency + exchange.received / link.bandwidth
    if exchange.method == "lasp":
        return (ranks - 1) * (link.latency + exchange.received / link.bandwidth)
    return link.seconds(ranks, exchange.received, exchange.blocks)


def predict(traffic: Traffic, local: float, ranks: int, link: Link) -> float:
    """Seconds of a step: the local work, and every exchange after it, none hidden."""
    halos = sum(link.latency + size / link.bandwidth for size in traffic.halos)
    return local + halos + sum(seconds_of(exchange, ranks, link) for exchange in traffic.states)


def local_seconds(model: nn.Module, tokens: int, repeats: int, say: Callable[[str], None]) -> float:
    """The median of one rank's own work, forward and backward over `tokens`, on this machine."""
    device = next(model.parameters()).device
    ids = as_model(model).example(1, tokens)["tokens"]
    times: list[float] = []
    for i in range(repeats + 1):  # the first warms up
        say(f"local step {i} of {repeats}")
        start = time.perf_counter()
        hidden, _ = model.encode(ids)  # type: ignore[operator]
        loss: Any = model.head_loss(hidden, ids)  # type: ignore[operator]
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    return statistics.median(times[1:])


@dataclass(frozen=True)
class Prediction:
    """What `zoo bench cp` found: the local step, and for each number of ranks every method's seconds and bytes."""

    local: float
    tokens: int
    rows: list[tuple[int, dict[str, tuple[float, int]]]]

    def markdown(self) -> str:
        """Tokens/s of one rank, as a share of what it would make alone, and what it receives."""
        methods = list(self.rows[0][1])
        head = ["ranks", "tokens in all", *(f"{m}: tokens/s a rank" for m in methods), *(f"{m}: MiB" for m in methods)]
        lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for ranks, by_method in self.rows:
            cells = [f"{ranks}", f"{ranks * self.tokens:,}"]
            cells += [f"{self.tokens / seconds:,.0f} ({self.local / seconds:.1%})" for seconds, _ in by_method.values()]
            cells += [f"{size / 2**20:,.2f}" for _, size in by_method.values()]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def predict_model(
    build: Callable[[int], nn.Module],
    layers: int,
    period: int,
    *,
    ranks: Sequence[int],
    tokens: int,
    link: Link,
    methods: Sequence[str] = STATES,
    local: float | None = None,
    repeats: int = 3,
    say: Callable[[str], None] = lambda text: None,
) -> Prediction:
    """Predict a training step of a deep model from one and two periods of its layers.

    Args:
        build: number of layers -> the model.
        layers, period: how deep it is, and after how many layers its mixers repeat.
        ranks: numbers of ranks to predict for.
        tokens: of one rank.
        link: what a message costs.
        methods: of STATES.
        local: seconds of one rank's own step; measured here when omitted.
    """
    times = layers / period
    model = build(period)
    if local is None:
        one = local_seconds(model, tokens, repeats, say)
        two = local_seconds(build(2 * period), tokens, repeats, say)
        local = one + (two - one) * (times - 1)
    rows = []
    for P in ranks:
        by_method = {}
        for method in methods:
            say(f"{method} on {P} ranks")
            traffic = exchanges_of(model, P, method, link)
            exposed = predict(traffic, 0.0, P, link) * times
            by_method[method] = (local + exposed, round(traffic.received * times))
        rows.append((P, by_method))
    return Prediction(local, tokens, rows)
