"""What the generated tasks share: samples by number, training and validation apart, and accuracy as the metric."""

import copy
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch

from zoo.errors import UserError
from zoo.train.data.core.base import DataModule, LoaderSettings, Metric, at_least
from zoo.train.data.core.loader import Batch, Source
from zoo.train.data.synthetic._philox import Draws, philox

TRAINING, VALIDATION = 0, 1  # streams of one seed
# Of how many different rows a sample may be one, as a power of two. From the first on, rows are split between the
# streams. From the second on there is no need: 2**30 rows of training meet 2**10 of validation with odds of 2**-16.
SPLIT, APART = 6, 56
HELD_OUT = 0.25  # share of the rows that are validation's, where rows are split
ATTEMPTS = 300  # draws of a row until it is on its side; 0.75**300 is 1e-38
HASH_KEY = 0x7A6F6F  # any number, for ever the same: it says on which side a row is


class SyntheticData(DataModule):
    """Samples drawn from a seed; sample i of a stream is a pure function of (settings, seed, stream, i).

    Epochs only say how often to validate: every sample is a new draw. Training and validation have no row in common,
    whatever their seeds: where there are fewer than 2**56 different rows, a hash of a row's tokens says whose it is (a
    quarter is validation's), and a sample that falls on the other side is drawn again; where there are more, even 2**30
    training rows meet one of 2**10 with odds below 2**-16, and nothing is drawn again. Rows of fewer than 64
    possibilities are too few to split: both sides have them, and `setup` warns of it.

    A subclass gives `generate`, and in `variety` the number of rows.
    """

    metrics: tuple[Metric, ...] = ("accuracy",)

    def __init__(
        self,
        loading: LoaderSettings | None = None,
        *,
        vocab_size: int,
        seq_len: int,
        train_samples: int,
        val_samples: int,
        **each: int,
    ):
        super().__init__(loading, **each)
        at_least("seq_len", seq_len, 1)
        at_least("train_samples", train_samples, self.batch_size)
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

    @abstractmethod
    def variety(self) -> float:
        """Of how many different rows a sample is one, as a power of two: the least where lengths differ."""

    def lengths(self, draws: Draws) -> np.ndarray:
        """Tokens of each sample that are no filler, (count, 1); the first thing that `generate` may draw."""
        return np.full((draws.count, 1), self.seq_len)

    def splits(self, lengths: np.ndarray) -> np.ndarray:
        """Whether rows of these lengths are split between training and validation, bool, of the same shape."""
        return np.full(lengths.shape, SPLIT <= self.variety() < APART)

    def again(self, draws: Draws, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `generate`, for samples whose lengths are known."""
        return self.generate(draws, len(lengths))

    def shared(self) -> float:
        """Share of the validation rows that are of too few possibilities to be kept out of training."""
        return float(self.variety() < SPLIT)

    def setup(self, stage: str | None = None) -> None:
        """As for all data; says once what training and validation share."""
        super().setup(stage)
        if share := self.shared():
            warnings.warn(
                f"validation should have no row of training; {share:.0%} of its rows are drawn from fewer than "
                f"{2**SPLIT} possible ones, all of which training has, too: make sequences longer or the vocabulary "
                "larger",
                stacklevel=2,
            )

    def samples(self, indices: np.ndarray, stream: int = TRAINING) -> Batch:
        """Samples by number, as one batch.

        Raises:
            UserError: a row of the stream's side is not found.
        """
        tokens, targets = self.generate(Draws(self.seed, stream, indices), len(indices))
        lengths = self.lengths(Draws(self.seed, stream, indices))
        split = self.splits(lengths)[:, 0]
        for attempt in range(1, ATTEMPTS):
            wrong = np.flatnonzero(split & ((_places(tokens, lengths) < HELD_OUT) != (stream == VALIDATION)))
            if not len(wrong):
                return {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}
            draws = Draws(self.seed, stream + 2 * attempt, indices[wrong])
            tokens[wrong], targets[wrong] = self.again(draws, lengths[wrong])
        raise UserError(
            "training and validation must have rows of their own; these settings allow so few that none was found for "
            "one of them: make sequences longer or data.vocab_size larger"
        )

    def make_sources(self) -> tuple[Source, Source]:
        """Samples of the training and of the validation stream, which have no row in common."""
        settings = self._settings()
        return _Samples(settings, self.train_samples, TRAINING), _Samples(settings, self.val_samples, VALIDATION)

    def _settings(self) -> Self:
        """A copy for workers, without the trainer."""
        settings = copy.copy(self)
        settings.trainer = settings._loader = settings._sources = None
        return settings


def _places(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each row, (count,), that depends on its first `lengths` tokens alone: a multilinear hash.

    (D. Lemire and O. Kaser, "Strongly universal string hashing is fast", 2014: its high bits are pairwise independent.)
    """
    at = np.arange(tokens.shape[1], dtype=np.uint64)
    words = philox(at, np.zeros_like(at), np.zeros_like(at), np.zeros_like(at), HASH_KEY)
    weights = words[:, 0] << np.uint64(32) | words[:, 1]
    values = np.where(np.arange(tokens.shape[1]) < lengths, tokens + 1, 0).astype(np.uint64)
    share: np.ndarray = ((values * weights).sum(axis=1, dtype=np.uint64) >> np.uint64(32)) / 2.0**32
    return share


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
