"""Multi-query associative recall: the recall test of the Zoology paper (arXiv 2312.04927)."""

import math
from typing import Literal

import numpy as np

from zoo.errors import UserError
from zoo.train.data.core.base import LoaderSettings
from zoo.train.data.core.corpus import IGNORE
from zoo.train.data.synthetic._philox import Draws
from zoo.train.data.synthetic.base import SyntheticData


class MQAR(SyntheticData):
    """Key-value pairs first, then every key once more; the value must follow.

    The first 2 * n_pairs * n_passes tokens are k1 v1 k2 v2 ...: different keys out of [1, vocab_size / 2), different
    values out of [vocab_size / 2, vocab_size). The rest is slots of two positions; key j stands at the first of its
    own slot, slot i = 1, 2, ... drawn without replacement with odds power * i^(power - 1), so most come early. Its
    target there is its value; nothing else is scored. The generator is that of the paper's code, HazyResearch/zoology.

    Args:
        vocab_size: number of tokens, even and above seq_len.
        seq_len: tokens per sequence, even.
        n_pairs: pairs to remember.
        n_passes: how often the pairs are shown.
        power: exponent of the gaps' law.
        filler: what stands where no key does: "zero", or "random" tokens of the whole vocabulary, as in the paper's
            harder setting; they may collide with keys and values.
        batch_size: sequences per step and rank.
        train_samples: fresh sequences per epoch.
        val_samples: sequences of validation.
        num_workers: processes that prepare batches ahead.
        seed: the run's seed.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 128,
        seq_len: int = 64,
        n_pairs: int = 16,
        n_passes: int = 1,
        power: float = 0.01,
        filler: Literal["zero", "random"] = "zero",
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
        if vocab_size % 2 or seq_len % 2 or vocab_size <= seq_len:
            raise UserError(
                f"mqar needs even data.vocab_size and data.seq_len, the first above the second; got {vocab_size} and "
                f"{seq_len}: raise data.vocab_size to an even number above data.seq_len"
            )
        if not 1 <= n_pairs < vocab_size // 2 or n_passes < 1 or 2 * n_pairs * (n_passes + 1) > seq_len:
            raise UserError(
                f"mqar needs 1 <= data.n_pairs < vocab_size / 2 and 2 * n_pairs * (n_passes + 1) <= seq_len; got "
                f"{n_pairs} pairs, {n_passes} passes, vocabulary {vocab_size}, length {seq_len}: lower data.n_pairs"
            )
        if filler not in ("zero", "random"):
            raise UserError(f"data.filler must be zero or random; got {filler!r}: choose one of the two")
        if power <= 0:
            raise UserError(f"data.power must be above 0; got {power}: the paper has 0.01")
        self.n_pairs, self.n_passes, self.power, self.filler = n_pairs, n_passes, power, filler

    def variety(self) -> float:
        """All keys and values in their order, and all that fills up; slots, which are not alike, are not counted."""
        half = self.vocab_size // 2
        pairs = math.log2(math.perm(half - 1, self.n_pairs) * math.perm(half, self.n_pairs))
        filled = self.seq_len - self.n_pairs * (2 * self.n_passes + 1) if self.filler == "random" else 0
        return pairs + filled * math.log2(self.vocab_size)

    def generate(self, draws: Draws, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequences and their values at the keys' second places."""
        keys = 1 + draws.choice(self.vocab_size // 2 - 1, self.n_pairs)
        values = self.vocab_size // 2 + draws.choice(self.vocab_size // 2, self.n_pairs)
        pairs = np.stack([keys, values], axis=2).reshape(count, -1)  # (count, 2 n_pairs)
        context = np.tile(pairs, self.n_passes)
        first = context.shape[1]
        slots = np.arange(1, (self.seq_len - first) // 2 + 1)
        places = first + 2 * draws.weighted_choice(self.power * slots ** (self.power - 1.0), self.n_pairs)
        if self.filler == "random":
            tokens = draws.integers(self.vocab_size, self.seq_len)
        else:
            tokens = np.zeros((count, self.seq_len), np.int64)
        tokens[:, :first] = context
        np.put_along_axis(tokens, places, keys, axis=1)
        targets = np.full((count, self.seq_len), IGNORE)
        np.put_along_axis(targets, places, values, axis=1)
        return tokens, targets
