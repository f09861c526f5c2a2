"""What the generated tasks share: samples by number, fresh in every epoch, and accuracy as the metric."""

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch

from zoo.train.data._philox import Draws
from zoo.train.data.base import DataModule, Metric, at_least
from zoo.train.data.loader import Batch, Source

TRAINING, VALIDATION = 0, 1  # streams of one seed that never meet


class SyntheticData(DataModule):
    """Samples drawn from a seed; sample i of a stream is a pure function of (settings, seed, stream, i).

    Training never sees a sample twice: epochs only say how often to validate. A subclass gives `generate`.
    """

    metrics: tuple[Metric, ...] = ("accuracy",)

    def __init__(
        self,
        *,
        vocab_size: int,
        seq_len: int,
        batch_size: int,
        train_samples: int,
        val_samples: int,
        num_workers: int,
        seed: int,
    ):
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        at_least("seq_len", seq_len, 1)
        at_least("train_samples", train_samples, batch_size)
        at_least("val_samples", val_samples, 1)
        self.seq_len, self.train_samples, self.val_samples = seq_len, train_samples, val_samples
        self._vocab_size = vocab_size

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        return self._vocab_size

    @abstractmethod
    def generate(self, draws: Draws, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets of `count` samples, both (count, seq_len) int64."""

    def samples(self, indices: np.ndarray, stream: int = TRAINING) -> Batch:
        """Samples by number, as one batch."""
        tokens, targets = self.generate(Draws(self.seed, stream, indices), len(indices))
        return {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}

    def make_sources(self) -> tuple[Source, Source]:
        """The two streams."""
        settings = self._settings()
        return _Samples(settings, self.train_samples, TRAINING), _Samples(settings, self.val_samples, VALIDATION)

    def _settings(self) -> Self:
        """A copy for workers, without the trainer."""
        settings = copy.copy(self)
        settings.trainer = settings._loader = settings._sources = None
        return settings


class _Samples:
    def __init__(self, data: SyntheticData, per_epoch: int, stream: int):
        self.data, self.per_epoch, self.stream = data, per_epoch, stream

    def steps(self, world: int) -> int:
        each = self.data.batch_size * world
        return self.per_epoch // each if self.stream == TRAINING else -(-self.per_epoch // each)

    def batch(self, epoch: int, step: int, rank: int, world: int) -> Batch:
        size = self.data.batch_size
        numbers = (step * size + np.arange(size)) * world + rank
        batch = self.data.samples(epoch * self.per_epoch + numbers, self.stream)
        batch["targets"][torch.from_numpy(numbers >= self.per_epoch)] = -100  # validation's last batch is filled up
        return batch


class ValidationSets:
    """Equally many batches of several sources, in turns, so that a limited validation has some of each.

    A batch says in "val_set" which source it is from.
    """

    def __init__(self, sources: Sequence[Source]):
        self.sources = sources

    def steps(self, world: int) -> int:
        """Those of all sources together."""
        each = {source.steps(world) for source in self.sources}
        assert len(each) == 1
        return len(self.sources) * each.pop()

    def batch(self, epoch: int, step: int, rank: int, world: int) -> Batch:
        """The next batch of the source whose turn it is."""
        turn, which = divmod(step, len(self.sources))
        batch = self.sources[which].batch(epoch, turn, rank, world)
        return {**batch, "val_set": torch.tensor(which)}
