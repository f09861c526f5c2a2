"""Handwritten digits as pictures of 8 x 8 pixels: real images that come with scikit-learn."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from zoo.errors import UserError
from zoo.train.data.core.base import DataModule, Metric, Part
from zoo.train.data.core.corpus import IGNORE, order
from zoo.train.data.core.loader import Batch, Source
from zoo.train.data.images.digits import CLASSES, HELD_OUT, LEVELS, load_digits

__all__ = ["DigitsImages"]


class DigitsImages(DataModule):
    """Optical recognition of handwritten digits (UCI, 1998): 1,797 pictures of 8 x 8 pixels.

    A batch holds "images" (B, 1, 8, 8) in [0, 1] and "labels" (B,) in [0, 10), -100 for a row that only fills the
    batch. The last 360 pictures are held out, in the order of the file, which goes by writer.

    Args:
        batch_size: pictures per step and rank.
        num_workers: processes that prepare batches ahead.
        seed: the run's seed: the order of training pictures.
    """

    metrics: tuple[Metric, ...] = ("accuracy",)
    n_classes = CLASSES
    image_size = 8
    channels = 1
    schema: Mapping[str, Part] = {"images": "same", "labels": "same"}

    def __init__(self, *, batch_size: int = 64, num_workers: int = 0, seed: int = 0):
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)

    def make_sources(self) -> tuple[Source, Source]:
        """The pictures, from the file that scikit-learn installs."""
        if load_digits is None:
            raise UserError(
                "data=digits_images needs the images that come with scikit-learn; pip install 'seqzoo[images]'"
            )
        file: Any = load_digits()
        images = (file.images[:, None] / (LEVELS - 1)).astype(np.float32)
        labels = file.target.astype(np.int64)
        train = Pictures(images[:-HELD_OUT], labels[:-HELD_OUT], batch_size=self.batch_size, seed=self.seed)
        return train, Pictures(images[-HELD_OUT:], labels[-HELD_OUT:], batch_size=self.batch_size, seed=None)


class Pictures:
    """Pictures of one size with a class each, shuffled in training.

    In training the pictures that do not fill a last step are left for another epoch. Validation has them all, in
    order, and fills up with rows whose label is -100.

    Args:
        images: (N, C, H, W) float32.
        labels: (N,) int64.
        batch_size: pictures per step and rank.
        seed: of the order; None for validation.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, *, batch_size: int, seed: int | None):
        self.images, self.labels, self.batch_size, self.seed = images, labels, batch_size, seed

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
        labels = np.where(there, self.labels[rows], IGNORE)
        return {"images": torch.from_numpy(self.images[rows]), "labels": torch.from_numpy(labels)}
