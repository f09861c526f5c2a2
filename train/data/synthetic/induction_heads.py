"""Induction heads: what followed the special token the first time must follow it the second time."""

import math

import numpy as np

from zoo.errors import UserError
from zoo.train.data.core.base import LoaderSettings
from zoo.train.data.core.corpus import IGNORE
from zoo.train.data.synthetic._philox import Draws
from zoo.train.data.synthetic.base import SyntheticData


class InductionHeads(SyntheticData):
    """Random tokens with one special token among them, and the special token once more at the end.

    The special token is vocab_size - 1. It first stands at a place uniform in [0, seq_len - 3], and again at the
    last position, whose target is the token after the first one; nothing else is scored. The other tokens are uniform
    over the rest, so that a guess is right 1 / (vocab_size - 1) of the time. The task of arXiv 2312.00752, appendix E.1
    (vocabulary 16, length 256 in training, up to 2**20 in the test).

    Args:
        vocab_size: number of tokens, the special one included.
        seq_len: tokens per sequence.
        batch_size: sequences per step and rank.
        train_samples: fresh sequences per epoch.
        val_samples: sequences of validation.
        num_workers: processes that prepare batches ahead.
        seed: the run's seed.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 16,
        seq_len: int = 256,
        batch_size: int = 32,
        train_samples: int = 16_000,
        val_samples: int = 512,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(
            LoaderSettings(batch_size=batch_size, num_workers=num_workers, seed=seed),
            vocab_size=vocab_size,
            seq_len=seq_len,
            train_samples=train_samples,
            val_samples=val_samples,
        )
        if vocab_size < 3 or seq_len < 3:
            raise UserError(
                "induction heads need two ordinary tokens beside the special one, and room for it, its successor and "
                f"its return; got data.vocab_size={vocab_size}, data.seq_len={seq_len}: raise both to at least 3"
            )

    def variety(self) -> float:
        """All places of the special token, and all other tokens."""
        return math.log2(self.seq_len - 2) + (self.seq_len - 2) * math.log2(self.vocab_size - 1)

    def generate(self, draws: Draws, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequences, and the token after the first special one as the target of the last position."""
        special = self.vocab_size - 1
        tokens = draws.integers(special, self.seq_len)
        place = draws.integers(self.seq_len - 2, 1)
        np.put_along_axis(tokens, place, special, axis=1)
        tokens[:, -1] = special
        targets = np.full((count, self.seq_len), IGNORE)
        targets[:, -1:] = np.take_along_axis(tokens, place + 1, axis=1)
        return tokens, targets
