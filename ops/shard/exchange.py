"""Messages and collectives between the ranks of a shard: the only calls of torch.distributed, and who counts them.

torch renames its collectives from version to version; whatever needs to know lives here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from zoo.ops.shard.sequence_shard import SequenceShard

# torch 2.13 renamed reduce_scatter_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Message(NamedTuple):
    """One exchange as a rank sees it: its kind, and the bytes that left and arrived, own copies not counted.

    kind: "send", "receive", "all_gather", "all_to_all", "reduce_scatter".
    what: "state", "halo", or "activations" (heads, keys and values, ...).
    """

    kind: str
    what: str
    sent: int
    received: int


ACTIVATIONS = "activations"
_OBSERVERS: list[Callable[[Message], None]] = []


@contextmanager
def observed(observer: Callable[[Message], None]) -> Iterator[None]:
    """Tell `observer` of every exchange of this process that completes inside, the backward's included.

    For counting bytes, and for emulating a slow link by sleeping in the observer.
    """
    _OBSERVERS.append(observer)
    try:
        yield
    finally:
        _OBSERVERS.remove(observer)


def _tell(kind: str, what: str, sent: int, received: int) -> None:
    for observer in _OBSERVERS:
        observer(Message(kind, what, sent, received))


class Pending:
    """A message under way; `wait` completes it and may be called once."""

    def __init__(self, kind: str, what: str, x: Tensor, work: Any):
        self._kind, self._what = kind, what
        self._x, self._work = x, work  # the tensor must live until the message is through

    def wait(self) -> Tensor:
        """The tensor that was sent or received, once the message is complete; its bytes are counted here."""
        self._work.wait()
        size = self._x.nbytes
        _tell(self._kind, self._what, size if self._kind == "send" else 0, size if self._kind == "receive" else 0)
        return self._x


def send(shard: SequenceShard, x: Tensor, peer: int, what: str = ACTIVATIONS) -> Pending:
    """Start to send to a rank of the group."""
    x = x.contiguous()
    return Pending("send", what, x, dist.isend(x, group=shard.group, group_dst=shard.peer(peer)))


def receive(shard: SequenceShard, like: Tensor, peer: int, what: str = ACTIVATIONS) -> Pending:
    """Start to receive a tensor such as `like` from a rank of the group; messages of one sender arrive in order."""
    x = torch.empty_like(like, memory_format=torch.contiguous_format)
    return Pending("receive", what, x, dist.irecv(x, group=shard.group, group_src=shard.peer(peer)))


class Meeting:
    """Messages under way to and from several ranks; `wait` completes them and may be called once."""

    def __init__(self, what: str, sends: Sequence[Tensor], receives: dict[int, list[Tensor]], work: Sequence[Any]):
        self._what, self._work = what, work
        self._sends, self._receives = sends, receives  # tensors must live until they are through

    def wait(self) -> dict[int, list[Tensor]]:
        """{rank: what came from there}."""
        for request in self._work:
            request.wait()
        for x in self._sends:
            _tell("send", self._what, x.nbytes, 0)
        for tensors in self._receives.values():
            for x in tensors:
                _tell("receive", self._what, 0, x.nbytes)
        return self._receives


def meet(
    shard: SequenceShard,
    sends: Mapping[int, Sequence[Tensor]],
    receives: Mapping[int, Sequence[Tensor]],
    what: str = ACTIVATIONS,
) -> Meeting:
    """Start to send tensors to some ranks and to receive from some at once: {rank: tensors like what comes} in.

    All ranks must meet in the same order, each message's two ends in the same meeting; empty tensors do not travel.
    """
    out = {peer: [x.contiguous() for x in tensors] for peer, tensors in sorted(sends.items())}
    back = {
        peer: [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
        for peer, tensors in sorted(receives.items())
    }
    work = [
        dist.P2POp(action, x, group=shard.group, group_peer=shard.peer(peer))
        for action, messages in ((dist.isend, out), (dist.irecv, back))
        for peer, tensors in messages.items()
        for x in tensors
        if x.numel()
    ]
    sent = [x for tensors in out.values() for x in tensors]
    return Meeting(what, sent, back, dist.batch_isend_irecv(work) if work else [])


def swap(
    shard: SequenceShard, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], what: str = ACTIVATIONS
) -> dict[int, Tensor]:
    """Send to some ranks and receive from some at once: {rank: tensor} out, {rank: tensor like what comes} in."""
    meeting = meet(shard, {peer: [x] for peer, x in sends.items()}, {peer: [x] for peer, x in receives.items()}, what)
    return {peer: x for peer, (x,) in meeting.wait().items()}


def all_gather(shard: SequenceShard, x: Tensor, what: str = ACTIVATIONS) -> list[Tensor]:
    """The x of all ranks, in their order, which are of one shape."""
    x = x.contiguous()
    if shard.ranks is None:
        everyone = [torch.empty_like(x) for _ in range(shard.size)]
        dist.all_gather(everyone, x, group=shard.group)
        everyone = everyone[::-1] if shard.backwards else everyone
    else:
        everyone = _between_pairs(shard, [x] * shard.size, [x] * shard.size, range(shard.size))
    others = (shard.size - 1) * x.nbytes
    _tell("all_gather", what, others, others)
    return everyone


def all_to_all(
    shard: SequenceShard, parts: Sequence[Tensor], likes: Sequence[Tensor], ranks: Sequence[int] | None = None
) -> list[Tensor]:
    """parts[i] goes to ranks[i], and what comes from there is like likes[i]; all ranks of the group when omitted.

    By messages between pairs, so that any subset of the group may meet without a group of its own.
    """
    ranks = range(shard.size) if ranks is None else ranks
    arrived = _between_pairs(shard, parts, likes, ranks)
    others = [i for i, rank in enumerate(ranks) if rank != shard.rank]
    _tell("all_to_all", ACTIVATIONS, sum(parts[i].nbytes for i in others), sum(arrived[i].nbytes for i in others))
    return arrived


def _between_pairs(
    shard: SequenceShard, parts: Sequence[Tensor], likes: Sequence[Tensor], ranks: Sequence[int]
) -> list[Tensor]:
    """parts[i] goes to ranks[i], and what comes from there is like likes[i]; the own part stays."""
    others = [(i, rank) for i, rank in enumerate(ranks) if rank != shard.rank]
    out = [parts[i].contiguous() for i, _ in others]
    back = [torch.empty_like(likes[i], memory_format=torch.contiguous_format) for i, _ in others]
    work = [
        dist.P2POp(action, x, group=shard.group, group_peer=shard.peer(rank))
        for action, tensors in ((dist.isend, out), (dist.irecv, back))
        for x, (_, rank) in zip(tensors, others, strict=True)
        if x.numel()
    ]
    if work:
        for request in dist.batch_isend_irecv(work):
            request.wait()
    arrived = {i: x for (i, _), x in zip(others, back, strict=True)}
    return [arrived[i] if i in arrived else parts[i] for i in range(len(ranks))]


def reduce_scatter(shard: SequenceShard, x: Tensor) -> Tensor:
    """The sum over all ranks of their x[rank], for x (size, ...)."""
    if shard.ranks is None:
        x = x.flip(0) if shard.backwards else x
        out = torch.empty_like(x[0], memory_format=torch.contiguous_format)
        _reduce_scatter(out, x.contiguous().flatten(0, 1) if x.ndim > 1 else x, group=shard.group)
    else:
        out = torch.stack(_between_pairs(shard, x.unbind(), [x[0]] * shard.size, range(shard.size))).sum(0)
    others = (shard.size - 1) * out.nbytes
    _tell("reduce_scatter", ACTIVATIONS, others, others)
    return out
