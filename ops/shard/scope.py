"""The shard in use here, and recomputation that reads arrivals back and sends nothing."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from typing import NamedTuple

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from zoo.ops.shard.sequence_shard import SequenceShard
from zoo.ops.shard.torch_modules import watch


class Scope(NamedTuple):
    """The current shard, and where arrivals are written down or read back when activations are recomputed."""

    shard: SequenceShard
    records: tuple[list[Tensor], ...] = ()
    replay: Iterator[Tensor] | None = None

    def arrival(self, exchange: Callable[[], Tensor]) -> Tensor:
        """What an exchange brings; a recomputation reads it back and sends nothing."""
        (arrived,) = self.arrivals(lambda: (exchange(),), 1)
        return arrived

    def arrivals(self, exchange: Callable[[], tuple[Tensor, ...]], count: int) -> tuple[Tensor, ...]:
        """The same for an exchange that brings `count` tensors."""
        replay = self.replay
        arrived = exchange() if replay is None else tuple(next(replay).detach() for _ in range(count))
        for record in self.records:
            record += [x.detach() for x in arrived]
        return arrived


_SCOPE: ContextVar[Scope | None] = ContextVar("zoo_sequence_shard", default=None)
_ENTERED: list[None] = []  # one entry per scope open on any thread: torch.compile can read a list, not a ContextVar


def scope() -> Scope | None:
    """The scope in use here, or None; costs the length of a list where no shard is in use."""
    return _SCOPE.get() if _ENTERED else None


class _Entering(AbstractContextManager[None]):
    """Sets the scope; may be entered again, as recomputation does."""

    def __init__(self, scope: Callable[[], Scope | None]):
        self._scope = scope
        self._tokens: list[Token[Scope | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_SCOPE.set(self._scope()))
        _ENTERED.append(None)

    def __exit__(self, *error: object) -> None:
        _ENTERED.pop()
        _SCOPE.reset(self._tokens.pop())


class _Watching(_Entering):
    """The same; modules of torch's own that look along time are refused inside."""

    def __init__(self, scope: Callable[[], Scope | None]):
        super().__init__(scope)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        super().__enter__()
        self._handles.append(watch(lambda: current() is not None))

    def __exit__(self, *error: object) -> None:
        self._handles.pop().remove()
        super().__exit__(*error)


def use(shard: SequenceShard | None) -> AbstractContextManager[None]:
    """Everything inside is one rank's stretch of time; None switches an outer shard off.

    Inside, modules of torch's own that look along time raise ValueError: a convolution without a halo would run on its
    stretch as if it were the whole sequence. Functions of torch that are called directly are not seen.
    """
    if shard is None or shard.size == 1:
        return _Entering(lambda: None if shard is None else Scope(shard))
    return _Watching(lambda: Scope(shard))


def alone() -> AbstractContextManager[None]:
    """Inside nothing is cut: for an operator that has exchanged what it needs. Nothing is asked without a shard."""
    return nullcontext() if scope() is None else use(None)


def current() -> SequenceShard | None:
    """The shard in use here, or None."""
    found = scope()
    return None if found is None else found.shard


def seen_as(place: SequenceShard) -> AbstractContextManager[None]:
    """Inside a shard, another view of the same ranks; recomputation reads arrivals back in the order of both."""
    found = scope()
    assert found is not None
    other = found._replace(shard=place)
    return _Entering(lambda: other)


def from_the_right() -> AbstractContextManager[None]:
    """Inside, time runs from the last rank to the first: operators on flipped stretches hear from the ranks after."""
    found = scope()
    return nullcontext() if found is None else seen_as(found.shard.reversed())


def refuse(what: str) -> None:
    """Raise where a computation would silently take its own stretch of time for the whole sequence."""
    if current() is not None:
        raise ValueError(
            f"{what} cannot be cut across ranks: each would take its stretch of time for the whole sequence; "
            "run it outside zoo.ops.shard.use(...)"
        )


def arrived(*tensors: Tensor) -> AbstractContextManager[None]:
    """Inside, exchanges of the shard in use here bring these tensors and send nothing; their backward is real."""
    found = scope()
    assert found is not None
    return _Entering(lambda: Scope(found.shard, (), iter(tensors)))


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of torch.utils.checkpoint: recomputation keeps the shard, reads arrivals back and sends nothing."""
    found = scope()
    if found is None:
        return nullcontext(), nullcontext()
    tape: list[Tensor] = []
    forward = Scope(found.shard, (*found.records, tape), found.replay)
    return _Entering(lambda: forward), _Entering(lambda: Scope(found.shard, (), iter(tape)))
