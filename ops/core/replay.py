"""What recomputation must not do twice: a first pass writes down what it made, a second pass reads it back in order.

Two things are dear inside a checkpointed block: operators over time (`zoo.ops.core.recompute`) and messages from other
ranks (`zoo.ops.shard`). Both keep a `Tape` in a `Within`, which says what holds inside a `with`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar, Token
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Tape(NamedTuple, Generic[T]):
    """One pass through a block, which may lie inside another one.

    records: where it writes, its own list and those of the blocks around it.
    replay: what it reads instead of making it, in a second pass.
    """

    records: tuple[list[T], ...] = ()
    replay: Iterator[T] | None = None

    def value(self, make: Callable[[], T]) -> T:
        """What `make` makes; in a second pass what it made in the first."""
        made = make() if self.replay is None else next(self.replay)
        for record in self.records:
            record.append(made)
        return made

    @property
    def recomputes(self) -> bool:
        """Whether this is one of two passes."""
        return bool(self.records) or self.replay is not None

    def first_pass(self, own: list[T]) -> "Tape[T]":
        """The first pass through a block inside this one."""
        return Tape((*self.records, own), self.replay)

    @staticmethod
    def second_pass(own: list[T]) -> "Tape[T]":
        """Each call begins at the first entry."""
        return Tape((), iter(own))


class Within(Generic[T]):
    """A value that holds inside a `with`, on one thread; None outside."""

    def __init__(self, name: str):
        self._value: ContextVar[T | None] = ContextVar(name, default=None)
        self._entered: list[None] = []  # one entry per `with` on any thread: the compiler can read a list alone

    def get(self) -> T | None:
        """The value here; costs the length of a list where none is set."""
        return self._value.get() if self._entered else None

    def inside(
        self, value: Callable[[], T | None], *others: Callable[[], AbstractContextManager[object]]
    ) -> AbstractContextManager[None]:
        """A `with` in which the value holds; may be entered again, as recomputation does.

        Args:
            value: asked at each entering.
            others: make what is entered beside it, before.
        """
        return _Inside(self, value, others)


class _Inside(AbstractContextManager[None], Generic[T]):
    def __init__(
        self,
        setting: Within[T],
        value: Callable[[], T | None],
        others: tuple[Callable[[], AbstractContextManager[object]], ...],
    ):
        self._setting, self._make, self._others = setting, value, others
        self._open: list[tuple[Token[T | None], ExitStack]] = []

    def __enter__(self) -> None:
        stack = ExitStack()
        for other in self._others:
            stack.enter_context(other())
        self._open.append((self._setting._value.set(self._make()), stack))
        self._setting._entered.append(None)

    def __exit__(self, *error: object) -> None:
        self._setting._entered.pop()
        token, stack = self._open.pop()
        self._setting._value.reset(token)
        stack.close()
