"""Copying, plain and selective: remember tokens in their order, with or without blanks to be told apart."""

import math
from typing import Literal

import numpy as np

from zoo.errors import UserError
from zoo.train.data.core.base import LoaderSettings
from zoo.train.data.core.corpus import IGNORE
from zoo.train.data.synthetic._philox import Draws
from zoo.train.data.synthetic.base import SyntheticData


class Copying(SyntheticData):
    """n_tokens to remember, blanks, the copy symbol, then n_tokens blanks at which the tokens are due.

    "selective": the tokens stand at random places among the blanks, in their order (arXiv 2312.00752, and the MAD
    suite, arXiv 2403.17844, whose layout this is); "plain": they come first, then all the blanks. The blank is
    vocab_size - 2, the copy symbol vocab_size - 1; the tokens are uniform over the rest.

    Args:
        vocab_size: number of tokens, blank and copy symbol included.
        seq_len: tokens per sequence.
        n_tokens: tokens to remember.
        variant: "selective" or "plain".
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
        n_tokens: int = 16,
        variant: Literal["selective", "plain"] = "selective",
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
        if vocab_size < 3:
            raise UserError(
                f"copying needs a token beside blank and copy symbol; got data.vocab_size={vocab_size}: raise it to 3"
            )
        if n_tokens < 1 or 2 * n_tokens + 1 > seq_len:
            raise UserError(
                f"copying needs 1 <= data.n_tokens and 2 * n_tokens + 1 <= seq_len; got {n_tokens} tokens and length "
                f"{seq_len}: lower data.n_tokens or raise data.seq_len"
            )
        if variant not in ("selective", "plain"):
            raise UserError(f"data.variant must be selective or plain; got {variant!r}: choose one of the two")
        self.n_tokens, self.variant = n_tokens, variant

    def variety(self) -> float:
        """All contents, and where they may stand."""
        places = math.comb(self.seq_len - self.n_tokens - 1, self.n_tokens) if self.variant == "selective" else 1
        return self.n_tokens * math.log2(self.vocab_size - 2) + math.log2(places)

    def generate(self, draws: Draws, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequences, and the tokens to remember as targets of the last n_tokens positions."""
        n, blank, copy = self.n_tokens, self.vocab_size - 2, self.vocab_size - 1
        content = draws.integers(self.vocab_size - 2, n)
        region = self.seq_len - n - 1  # where the tokens may stand
        if self.variant == "selective":
            places = np.sort(np.argsort(draws.bits(region), axis=1, kind="stable")[:, :n], axis=1)
        else:
            places = np.broadcast_to(np.arange(n), (count, n))
        tokens = np.full((count, self.seq_len), blank)
        np.put_along_axis(tokens, places, content, axis=1)
        tokens[:, region] = copy
        targets = np.full((count, self.seq_len), IGNORE)
        targets[:, -n:] = content
        return tokens, targets
