"""The shard in use here, and recomputation that reads arrivals back and sends nothing."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from torch import Tensor

from zoo.ops.core.replay import Tape, Within
from zoo.ops.shard.sequence_shard import SequenceShard
from zoo.ops.shard.torch_modules import watched


class Scope(NamedTuple):
    """The current shard, and the tape of what arrives, for recomputation reads that back and sends nothing."""

    shard: SequenceShard
    tape: Tape[tuple[Tensor, ...]] = Tape()

    def arrival(self, exchange: Callable[[], Tensor]) -> Tensor:
        """What an exchange brings; a recomputation reads it back and sends nothing."""
        (arrived,) = self.arrivals(lambda: (exchange(),))
        return arrived

    def arrivals(self, exchange: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The same for an exchange that brings several tensors; aliases, for autograd marks what it is given."""
        return tuple(x.detach() for x in self.tape.value(exchange))


_SCOPE: Within[Scope] = Within("zoo_sequence_shard")


def scope() -> Scope | None:
    """The scope in use here, or None; costs the length of a list where no shard is in use."""
    return _SCOPE.get()


def use(shard: SequenceShard | None) -> AbstractContextManager[None]:
    """Everything inside is one rank's stretch of time; None switches an outer shard off.

    Inside, modules of torch's own that look along time raise ValueError: a convolution without a halo would run on its
    stretch as if it were the whole sequence. Functions of torch that are called directly are not seen.
    """
    if shard is None or shard.size == 1:
        return _SCOPE.inside(lambda: None if shard is None else Scope(shard))
    return _SCOPE.inside(lambda: Scope(shard), lambda: watched(lambda: current() is not None))


def unsharded() -> AbstractContextManager[None]:
    """Inside nothing is cut: for an operator that has exchanged what it needs. Nothing is asked without a shard."""
    return nullcontext() if scope() is None else use(None)


def current() -> SequenceShard | None:
    """The shard in use here, or None."""
    active = scope()
    return None if active is None else active.shard


def use_view(place: SequenceShard) -> AbstractContextManager[None]:
    """Inside a shard, another view of the same ranks; recomputation reads arrivals back in the order of both."""
    active = scope()
    assert active is not None
    other = active._replace(shard=place)
    return _SCOPE.inside(lambda: other)


def from_the_right() -> AbstractContextManager[None]:
    """Inside, time runs from the last rank to the first: operators on flipped stretches hear from the ranks after."""
    active = scope()
    return nullcontext() if active is None else use_view(active.shard.reversed())


def refuse(what: str) -> None:
    """Raise where a computation would silently take its own stretch of time for the whole sequence."""
    if current() is not None:
        raise ValueError(
            f"{what} cannot be cut across ranks: each would take its stretch of time for the whole sequence; "
            "run it outside zoo.ops.shard.use(...)"
        )


def with_arrivals(*tensors: Tensor) -> AbstractContextManager[None]:
    """Inside, exchanges of the shard in use here bring these tensors and send nothing; their backward is real."""
    active = scope()
    assert active is not None
    return _SCOPE.inside(lambda: Scope(active.shard, Tape.second_pass([(x,) for x in tensors])))


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of torch.utils.checkpoint: recomputation keeps the shard, reads arrivals back and sends nothing."""
    active = scope()
    if active is None:
        return nullcontext(), nullcontext()
    own: list[tuple[Tensor, ...]] = []
    first = Scope(active.shard, active.tape.first_pass(own))
    return _SCOPE.inside(lambda: first), _SCOPE.inside(lambda: Scope(active.shard, Tape.second_pass(own)))
