"""Reversing a sequence of symbols: the smallest task from one sequence to another."""

import math
from collections.abc import Mapping

import numpy as np
import torch

from zoo.errors import UserError
from zoo.train.data.core.base import Metric, Part
from zoo.train.data.core.corpus import IGNORE
from zoo.train.data.core.loader import Batch
from zoo.train.data.synthetic._philox import Draws
from zoo.train.data.synthetic.base import APART, SPLIT, TRAINING, SyntheticData

__all__ = ["Reverse"]


class Reverse(SyntheticData):
    """A source of uniform symbols; the target is its symbols from the last to the first, then the end symbol.

    A batch holds "source" (B, S) and "source_lengths" (B,), and with T = S + 1 "tokens" (B, T), the begin symbol and
    then the reversed source, and "targets" (B, T), the reversed source and then the end symbol. The begin symbol is
    vocab_size - 2, the end symbol vocab_size - 1. Behind a row's length the source and the tokens hold the begin
    symbol, and targets are -100.

    Args:
        vocab_size: number of symbols, begin and end included.
        seq_len: S, symbols of the longest source.
        min_len: symbols of the shortest; lengths are uniform between the two.
        batch_size: sequences per step and rank.
        train_samples: fresh sequences per epoch.
        val_samples: sequences of validation.
        num_workers: processes that prepare batches ahead.
        seed: the run's seed.
    """

    metrics: tuple[Metric, ...] = ("accuracy",)
    schema: Mapping[str, Part] = dict.fromkeys(("source", "source_lengths", "tokens", "targets"), "same")

    def __init__(
        self,
        *,
        vocab_size: int = 18,
        seq_len: int = 16,
        min_len: int = 8,
        batch_size: int = 64,
        train_samples: int = 16_000,
        val_samples: int = 512,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(
            vocab_size=vocab_size,
            seq_len=seq_len,
            batch_size=batch_size,
            train_samples=train_samples,
            val_samples=val_samples,
            num_workers=num_workers,
            seed=seed,
        )
        if vocab_size < 4:
            raise UserError(
                f"reversing needs two symbols beside begin and end; got data.vocab_size={vocab_size}: raise it to 4"
            )
        if not 1 <= min_len <= seq_len:
            raise UserError(
                f"data.min_len must be between 1 and data.seq_len={seq_len}; got {min_len}: change one of the two"
            )
        self.min_len = min_len

    @property
    def begin(self) -> int:
        """The first token of every target."""
        return self._vocab_size - 2

    @property
    def end(self) -> int:
        """The last target of every sequence."""
        return self._vocab_size - 1

    def variety(self) -> float:
        """All sources of the least length."""
        return self.min_len * math.log2(self._vocab_size - 2)

    def lengths(self, draws: Draws) -> np.ndarray:
        """Symbols of each source."""
        return self.min_len + draws.integers(self.seq_len - self.min_len + 1, 1)

    def splits(self, lengths: np.ndarray) -> np.ndarray:
        """By each length's own number of sources."""
        variety = lengths * math.log2(self._vocab_size - 2)
        return (variety >= SPLIT) & (variety < APART)

    def shared(self) -> float:
        """Share of the lengths that have too few sources."""
        lengths = np.arange(self.min_len, self.seq_len + 1)
        return float((lengths * math.log2(self._vocab_size - 2) < SPLIT).mean())

    def generate(self, draws: Draws, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources, (count, seq_len), and what is made of them by `samples`."""
        return self.again(draws, self.lengths(draws))

    def again(self, draws: Draws, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `generate`, for sources whose lengths are known."""
        symbols = draws.integers(self._vocab_size - 2, self.seq_len)
        source = np.where(np.arange(self.seq_len) < lengths, symbols, self.begin)
        return source, source.copy()

    def samples(self, indices: np.ndarray, stream: int = TRAINING) -> Batch:
        """Samples by number, as one batch."""
        source = super().samples(indices, stream)["tokens"]
        lengths = (source != self.begin).sum(dim=1)
        at = torch.arange(self.seq_len + 1)
        back = (lengths[:, None] - 1 - at).clamp(min=0)  # place T of the target holds symbol L - 1 - T of the source
        turned = source.gather(1, back)
        targets = torch.where(at < lengths[:, None], turned, IGNORE)
        targets = torch.where(at == lengths[:, None], self.end, targets)
        tokens = torch.where((at > 0) & (at <= lengths[:, None]), turned.roll(1, dims=1), self.begin)
        return {"source": source, "source_lengths": lengths, "tokens": tokens, "targets": targets}
