"""Ranges of numbers, declared with a field: `n_heads: Annotated[int, Range(1)] = 4`.

What is declared here is checked before anything is built, kept in the index of models, and shown by `zoo show`.
"""

import functools
import inspect
import math
import typing
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass
from types import MappingProxyType
from typing import Any

from zoo.errors import UsageError

__all__ = ["Range", "check_fields", "ranges_of"]


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers.

    Args:
        least, most: the ends, which are allowed themselves; None for no such end.
        above, below: ends that are not allowed themselves.
    """

    least: float | None = None
    most: float | None = None
    _: KW_ONLY
    above: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            (isinstance(number, int) or math.isfinite(number))
            and (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        """In the notation of intervals: [1, inf)."""
        left = f"[{_short(self.least)}" if self.least is not None else f"({_short(self.above, -math.inf)}"
        right = f"{_short(self.most)}]" if self.most is not None else f"{_short(self.below, math.inf)})"
        return f"{left}, {right}"

    @property
    def rule(self) -> str:
        """What a number must be, to follow "must be"."""
        ends = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        given = [f"{words} {_short(end)}" for words, end in ends.items() if end is not None]
        return f"in {self}" if len(given) == 2 else "".join(given) or "finite"

    def check(self, name: str, value: Any) -> None:
        """Refuse a number, or numbers in a list, outside the range; None, text and truth values are no numbers.

        Raises:
            UsageError: the sentence names the rule and the value.
        """
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool) and number not in self:
                rule = "finite" if isinstance(number, float) and not math.isfinite(number) else self.rule
                raise UsageError(f"{name} must be {rule}, got {value}")

    def as_plain(self) -> dict[str, float]:
        """The ends that it has, by name; `Range(**plain)` is the range again."""
        return {name: end for name, end in asdict(self).items() if end is not None}


@functools.cache
def ranges_of(owner: Any) -> Mapping[str, Range]:
    """{field or parameter: its range} of a class or function.

    A subclass that declares a field anew, for another default, keeps the range unless it declares one.
    """
    declared: dict[str, Range] = {}
    for level in reversed(owner.__mro__) if isinstance(owner, type) else [owner]:
        declared |= _declared(level)
    return MappingProxyType(declared)


def check_fields(instance: Any, prefix: str = "") -> None:
    """Refuse a dataclass with a field outside its range; to be called by its `__post_init__`.

    Raises:
        UsageError: the sentence names the field after `prefix`.
    """
    kind: Any = type(instance)
    for name, range_ in ranges_of(kind).items():
        range_.check(prefix + name, getattr(instance, name))


def _short(end: float | None, otherwise: float = math.nan) -> str:
    """The end of an interval; a power of two, or one less, by its exponent."""
    end = otherwise if end is None else end
    for less in (0, 1):
        if isinstance(end, int) and end > 2**20 and (end + less).bit_count() == 1:
            return f"2**{(end + less).bit_length() - 1}" + (" - 1" if less else "")
    return str(end) if isinstance(end, int) else f"{end:g}"


def _declared(level: Any) -> dict[str, Range]:
    own = inspect.get_annotations(level)
    hints = typing.get_type_hints(level, include_extras=True) if own else {}
    inside = {name: _range_in(hints[name]) for name in own if name in hints}
    return {name: range_ for name, range_ in inside.items() if range_ is not None}


def _range_in(annotation: Any) -> Range | None:
    """The first range in an annotation, at any depth: Annotated[int, Range(1)] | None has one."""
    for part in getattr(annotation, "__metadata__", ()):
        if isinstance(part, Range):
            return part
    inner = (_range_in(part) for part in typing.get_args(annotation))
    return next((range_ for range_ in inner if range_ is not None), None)
