"""What a metric is: a name, a unit, which way is better, how it reads, and sums that batches and ranks add up to."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import Metric as Summed

__all__ = ["REGISTERED", "Metric", "Ratio", "base_name"]

REGISTERED: dict[str, type["Metric"]] = {}  # {name: class}, of every module that was imported


class Metric(Summed):
    """A number that validation is judged by. A subclass with a `name` is known by it from then on.

    A subclass keeps its sums by `add_state(name, zeros, dist_reduce_fx="sum")`, as `torchmetrics` has it, adds a batch
    in `update` and gives the number in `compute`. A task with `losses_of` calls `update(outputs, batch)`.

    Attributes:
        name: the column of metrics.csv is "val_" and this.
        label: what the progress line calls it; the name, with spaces, where it is left out.
        unit: of the number, as "dB"; empty for a pure number.
        better: which way is better.
        digits: behind the point, on the progress line.
    """

    full_state_update = False
    name: ClassVar[str] = ""
    label: ClassVar[str] = ""
    unit: ClassVar[str] = ""
    better: ClassVar[Literal["lower", "higher"]] = "lower"
    digits: ClassVar[int] = 4

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            return
        other = REGISTERED.get(cls.name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"a metric is known by its name, and {other.__module__}.{other.__qualname__} is called {cls.name!r} "
                f"already; give {cls.__qualname__} another name"
            )
        REGISTERED[cls.name] = cls

    @classmethod
    def text(cls, value: float) -> str:
        """A value as the progress line shows it."""
        return f"{value:.{cls.digits}f}{' ' if cls.unit else ''}{cls.unit}"

    @classmethod
    def title(cls) -> str:
        """The label, or the name with spaces."""
        return cls.label or cls.name.replace("_", " ")


class Ratio(Metric):
    """A sum over a count, both added up over batches and ranks: `update(total, count)`."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor) -> None:
        """Add the sum and the count of one batch."""
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        """The ratio so far."""
        return self.total / self.count


def base_name(column: str) -> str:
    """The metric's name of a column: without "val_", and without the validation set behind it."""
    return column.removeprefix("val_").partition("_at_")[0]
