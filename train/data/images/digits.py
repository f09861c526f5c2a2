"""Handwritten digits as sequences of 64 pixels: real images that come with scikit-learn."""

from typing import Any

import numpy as np
import torch

from zoo.errors import UserError
from zoo.train.data.core.base import WHOLE_SEQUENCES, DataModule, LoaderSettings, Metric
from zoo.train.data.core.corpus import IGNORE, order
from zoo.train.data.core.loader import Batch, Source

__all__ = ["CLASSES", "HELD_OUT", "LEVELS", "Digits", "Labelled", "load_digits"]

try:
    from sklearn.datasets import load_digits
except ImportError:
    load_digits = None

CLASSES, LEVELS = 10, 17  # digits; levels of grey
HELD_OUT = 360  # images at the end of the file, a fifth: other writers than most before them


class Digits(DataModule):
    """Optical recognition of handwritten digits (UCI, 1998): 1,797 images of 8 x 8 pixels, 17 levels of grey.

    An image is its 64 pixels, row by row, each level a token; its target is the digit. The last 360 images are held
    out, in the order of the file, which goes by writer.

    Args:
        batch_size: images per step and rank.
        num_workers: processes that prepare batches ahead.
        seed: the run's seed: the order of training images.
    """

    metrics: tuple[Metric, ...] = ("accuracy",)
    n_classes = CLASSES
    vocab_size = LEVELS
    schema = WHOLE_SEQUENCES

    def __init__(self, *, batch_size: int = 32, num_workers: int = 0, seed: int = 0):
        super().__init__(LoaderSettings(batch_size=batch_size, num_workers=num_workers, seed=seed))

    def make_sources(self) -> tuple[Source, Source]:
        """The images, from the file that scikit-learn installs."""
        if load_digits is None:
            raise UserError("data=digits needs the images that come with scikit-learn; pip install 'seqzoo[images]'")
        loaded: Any = load_digits()
        pixels, labels = loaded.data.astype(np.int64), loaded.target.astype(np.int64)
        train = Labelled(pixels[:-HELD_OUT], labels[:-HELD_OUT], batch_size=self.batch_size, seed=self.seed)
        return train, Labelled(pixels[-HELD_OUT:], labels[-HELD_OUT:], batch_size=self.batch_size, seed=None)


class Labelled:
    """Sequences of one length with a class each, shuffled in training.

    In training the sequences that do not fill a last step are left for another epoch. Validation has them all, in
    order, and fills up with rows whose target is -100.
    """

    def __init__(self, tokens: np.ndarray, labels: np.ndarray, *, batch_size: int, seed: int | None):
        self.tokens, self.labels, self.batch_size, self.seed = tokens, labels, batch_size, seed

    def steps(self, world: int) -> int:
        """Full steps in training, all in validation."""
        each = self.batch_size * world
        return len(self.labels) // each if self.seed is not None else -(-len(self.labels) // each)

    def batch(self, epoch: int, step: int, rank: int, world: int) -> Batch:
        """Rows rank, rank + world, ... of the step's."""
        rows = (step * self.batch_size + np.arange(self.batch_size)) * world + rank
        there = rows < len(self.labels)
        rows = np.where(there, rows, 0)
        if self.seed is not None:
            rows = order(len(self.labels), self.seed, epoch)[rows]
        targets = np.where(there, self.labels[rows], IGNORE)
        return {"tokens": torch.from_numpy(self.tokens[rows]), "targets": torch.from_numpy(targets)}
