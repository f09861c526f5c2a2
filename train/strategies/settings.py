"""What a strategy is told, checked and frozen: one value for each of the two kinds."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo.configs import VARIANTS
from zoo.errors import UserError
from zoo.ops.shard import ATTENTION, LAYOUTS, METHODS, Link
from zoo.train.balance import CostModel
from zoo.train.data.core.base import Part

__all__ = ["WEIGHTS", "CrossingSettings", "PlanSettings", "one_of"]

WEIGHTS = VARIANTS["strategy"]["weights"]  # where they lie: on every rank, or cut over all ranks
PLANNERS = ("auto", "packed", "flexible", "hybrid", "uniform")
RING_METHODS = ("allgather", "lasp", "lasp2", "zeco")  # for rings of any size: heads do not divide among these
RING_ATTENTION = ("lightseq", "allgather", "ring", "tokenring")


@dataclass(frozen=True, kw_only=True)
class CrossingSettings:
    """How time is cut; the docstring of `ContextParallelStrategy` says what each is.

    Raises:
        UserError: a name that is not known, or a number out of its range.
    """

    cp_size: int | None = None
    method: str = "zeco"
    attention: str | None = None
    layout: str | None = None
    link: Link = field(default_factory=Link)
    blocks: int | None = None
    inner: int | None = None
    schema: Mapping[str, Part] | None = None
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        one_of("attention", self.attention, (None, *ATTENTION))
        one_of("layout", self.layout, (None, *LAYOUTS))
        if self.cp_size is not None and self.cp_size < 1:
            raise UserError(f"strategy.cp_size must be at least 1, or null for all ranks; got {self.cp_size}")
        check_timeout(self.timeout)


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """How plans are made and their rings cross; the docstring of `BalancedStrategy` says what each is.

    Raises:
        UserError: a name that is not known, or a number out of its range.
    """

    planner: str = "auto"
    capacity: int | None = None
    chunk: int = 1
    method: str = "allgather"
    attention: str = "lightseq"
    cost: CostModel | None = None
    a1: float | None = None
    a2: float | None = None
    b1: float | None = None
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        one_of("planner", self.planner, PLANNERS)
        one_of("method", self.method, RING_METHODS)
        one_of("attention", self.attention, RING_ATTENTION)
        for name, size in (("capacity", self.capacity), ("chunk", self.chunk)):
            if size is not None and size < 1:
                raise UserError(f"strategy.{name} must be at least 1 token; got {size}")
        check_timeout(self.timeout)

    @property
    def coefficients(self) -> dict[str, Any]:
        """Those of the cost model that were given."""
        given = {"a1": self.a1, "a2": self.a2, "b1": self.b1}
        return {name: x for name, x in given.items() if x is not None}


def one_of(name: str, value: str | None, known: Collection[str | None]) -> None:
    """Refuse a name that is not known."""
    if value not in known:
        raise UserError(f"strategy.{name} must be one of {', '.join(map(str, known))}; got {value!r}")


def check_timeout(seconds: float) -> None:
    """Refuse a time that is none."""
    if seconds <= 0:
        raise UserError(f"strategy.timeout must be above 0 seconds; got {seconds}")
