"""Loaders whose position is two numbers: the epoch, and how many of its batches training has had.

A source of batches is a pure function of (epoch, step, rank): nothing is drawn from a generator that moves, so a
position is all there is to save. Lightning saves and restores it twice, through the data module and through the
loader itself; both hold the same numbers.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch = dict[str, Tensor]


class Source(Protocol):
    """Batches that are a pure function of epoch, step and rank."""

    def steps(self, world: int) -> int:
        """Batches of one epoch on each of `world` ranks."""
        ...

    def batch(self, epoch: int, step: int, rank: int, world: int) -> Any:
        """One rank's part of one step: a Batch, or a PlanBatch of several."""
        ...


class Loader:
    """Iterates over a source from a position on, and knows the position that training has reached.

    A pass ends with the epoch; the next one goes on from where the last stopped. The position counts batches handed
    out, whatever workers have prepared meanwhile, less those that `in_flight` says are not yet trained on.

    Args:
        source: the batches.
        epoch: where to start: the epoch
        batches: ... and the batches of it that are done.
        rank, world: this process among those that share the data.
        workers: processes that prepare batches ahead; 0 prepares each when it is asked for.
        limit: an epoch ends after this many batches at the latest (Lightning's limit_train_batches).
        restart: every pass starts at the same place (validation).
        in_flight: how many of the batches handed out are still being worked on.
        steps_of: the batches of each epoch, where they differ; `source.steps(world)` of all when omitted.
    """

    def __init__(
        self,
        source: Source,
        *,
        epoch: int = 0,
        batches: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        limit: int | None = None,
        restart: bool = False,
        in_flight: Callable[[], int] = lambda: 0,
        steps_of: Callable[[int], int] | None = None,
    ):
        self.source, self.rank, self.world, self.workers = source, rank, world, workers
        self.restart, self.in_flight = restart, in_flight
        steps = source.steps(world)
        self._steps_of = steps_of or (lambda epoch: steps)
        self._limit = limit
        self._epoch, self._batches = epoch, batches

    def __len__(self) -> int:
        """Batches of the whole epoch, whatever the position in it: Lightning subtracts what it has done itself."""
        return self._steps_of(0 if self.restart else self.position[0])

    def _end(self, epoch: int) -> int:
        steps = self._steps_of(epoch)
        return steps if self._limit is None else min(self._limit, steps)

    @property
    def position(self) -> tuple[int, int]:
        """(epoch, batches of it done), where the next pass starts."""
        return self._normal(self._batches)

    def _normal(self, batches: int) -> tuple[int, int]:
        return (self._epoch, batches) if batches < self._end(self._epoch) else (self._epoch + 1, 0)

    def state_dict(self) -> dict[str, int]:
        """The position without the batches in flight."""
        epoch, batches = self._normal(max(0, self._batches - self.in_flight()))
        return {"epoch": epoch, "batches": batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position; takes effect with the next pass."""
        self._epoch, self._batches = state["epoch"], state["batches"]

    def __iter__(self) -> Iterator[Any]:
        # A generator: the position is read when the first batch is asked for, so a loader that Lightning iterates
        # over more than once before a pass begins, or restores after that, still starts where it should.
        epoch, first = (0, 0) if self.restart else self.position
        for done, batch in enumerate(self._prepared(epoch, first), first + 1):
            self._epoch, self._batches = epoch, done
            yield batch

    def _prepared(self, epoch: int, first: int) -> Iterator[Any]:
        steps = _Steps(self.source, epoch, self.rank, self.world)
        numbers = range(first, self._end(epoch))
        if self.workers == 0:
            return (steps[step] for step in numbers)
        return iter(
            DataLoader(
                steps,
                batch_size=None,
                sampler=numbers,
                num_workers=self.workers,
                generator=torch.Generator(),  # else every pass would draw from the global generator
            )
        )


class _Steps(Dataset[Any]):
    """One epoch of one rank by step, for torch's worker processes."""

    def __init__(self, source: Source, epoch: int, rank: int, world: int):
        self.source, self.epoch, self.rank, self.world = source, epoch, rank, world

    def __getitem__(self, step: int) -> Any:
        return self.source.batch(self.epoch, step, self.rank, self.world)
