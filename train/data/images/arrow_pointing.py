"""Arrow pointing: does the arrow point at the disc? Pictures of any size, drawn from a seed."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from zoo.errors import UserError
from zoo.train.data.core.base import DataModule, Metric, Part, at_least
from zoo.train.data.core.corpus import IGNORE
from zoo.train.data.core.loader import Batch, Source
from zoo.train.data.synthetic._philox import Draws

__all__ = ["ArrowPointing", "Scenes", "draw", "scenes"]

PAD, RADII, LENGTHS, WIDTHS = 30.0, (15.0, 30.0), (15.0, 30.0), (2.0, 4.0)  # pixels at object_scale = 1
MARGIN = 1.2  # the disc that an arrow is aimed at is smaller by this, and the one that it is aimed past is larger
HEAD_ANGLE, HEAD_SHARE = 0.5, 2.5  # radians on either side of the shaft; the shaft's length over that of a stroke
TRAINING, VALIDATION = 0, 1


class ArrowPointing(DataModule):
    """A black arrow and a black disc on white: class 1 where the arrow points at the disc, 0 where it points past it.

    Sizes of arrow and disc do not depend on that of the picture, so that a larger picture asks for a longer way. A
    batch holds "images" (B, channels, image_size, image_size) in [0, 1], 1 for white, and "labels" (B,), -100 for a row
    that only fills the batch. Sample i is a pure function of (settings, seed, i); every training sample is a new one.

    Args:
        image_size: rows and columns.
        object_scale: factor on the sizes of arrow, disc and border: 1 for pictures of 192, 1/3 for pictures of 64.
        channels: all alike; 3 as published.
        batch_size: pictures per step and rank.
        train_samples: fresh pictures of an epoch.
        val_samples: pictures of validation.
        num_workers: processes that prepare batches ahead.
        seed: the run's seed.

    Raises:
        UserError: the picture is too small for the objects, or a number is below its least value.

    Source: arXiv 2506.11997, section 5; the generator of ml-jku/arrow_pointing_dataset by its description. Lines are
    drawn with soft edges here, so that small pictures keep the angle.
    """

    metrics: tuple[Metric, ...] = ("accuracy",)
    n_classes = 2
    schema: Mapping[str, Part] = {"images": "same", "labels": "same"}

    def __init__(
        self,
        *,
        image_size: int = 192,
        object_scale: float = 1.0,
        channels: int = 3,
        batch_size: int = 128,
        train_samples: int = 100_000,
        val_samples: int = 5_120,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        at_least("channels", channels, 1)
        at_least("train_samples", train_samples, batch_size)
        at_least("val_samples", val_samples, 1)
        if not object_scale > 0:
            raise UserError(f"data.object_scale must be above 0; got {object_scale}")
        least = math.ceil(object_scale * (2 * PAD + 4 * RADII[1]))
        if image_size < least:
            raise UserError(
                f"pictures with objects of scale {object_scale:g} need data.image_size of at least {least}; got "
                f"{image_size}, raise it or lower data.object_scale"
            )
        self.image_size, self.object_scale, self.channels = image_size, object_scale, channels
        self.train_samples, self.val_samples = train_samples, val_samples

    def make_sources(self) -> tuple[Source, Source]:
        """Pictures of the training and of the validation stream."""
        return self._drawn(self.train_samples, TRAINING), self._drawn(self.val_samples, VALIDATION)

    def _drawn(self, per_epoch: int, stream: int) -> "_Drawn":
        return _Drawn(
            self.image_size, self.object_scale, self.channels, self.batch_size, self.seed, per_epoch, stream
        )  # fmt: skip


class Scenes(NamedTuple):
    """What is on pictures, (B,) float64 each, in pixels from the upper left corner; angles from x towards y.

    x, y: the middle of the arrow; angle: where it points; length, width: of its shaft; disc_x, disc_y, radius: the
    disc; label: 1 where the arrow points at it.
    """

    x: np.ndarray
    y: np.ndarray
    angle: np.ndarray
    length: np.ndarray
    width: np.ndarray
    disc_x: np.ndarray
    disc_y: np.ndarray
    radius: np.ndarray
    label: np.ndarray


def scenes(draws: Draws, image_size: int, scale: float) -> Scenes:
    """Scenes of a batch: arrow and disc at least 2 radii apart in x and in y, and a fair label.

    Args:
        draws: the random numbers of the batch.
        image_size: rows and columns.
        scale: of the objects.
    """
    u = draws.uniform(9).T  # (9, B)
    radius = scale * (RADII[0] + (RADII[1] - RADII[0]) * u[0])
    length, width = (
        scale * np.floor(low + (high - low) * each) for (low, high), each in ((LENGTHS, u[1]), (WIDTHS, u[2]))
    )
    side = image_size - 2 * scale * PAD
    x, y = side * u[3], side * u[4]
    disc_x, disc_y = (at + 2 * radius + (side - 4 * radius) * each for at, each in ((x, u[5]), (y, u[6])))
    disc_x, disc_y = (np.where(at > side, at - side, at) for at in (disc_x, disc_y))
    label = (u[7] < 0.5).astype(np.float64)
    distance = np.hypot(disc_x - x, disc_y - y)
    half = np.arcsin(np.where(label == 1, radius / MARGIN, radius * MARGIN) / distance)  # half the angle of the disc
    turn = np.where(label == 1, (2 * u[8] - 1) * half, half + u[8] * (2 * np.pi - 2 * half))
    border = scale * PAD
    return Scenes(
        x + border, y + border, np.arctan2(disc_y - y, disc_x - x) + turn, length, width, disc_x + border,
        disc_y + border, radius, label,
    )  # fmt: skip


def draw(scene: Scenes, image_size: int, scale: float) -> np.ndarray:
    """Pictures (B, image_size, image_size) float32, black 0 on white 1, edges as wide as a pixel."""
    s = Scenes(*(each.astype(np.float32)[:, None, None] for each in scene))
    at = np.arange(image_size, dtype=np.float32) + np.float32(0.5)
    X, Y = at[None, None, :], at[None, :, None]
    cos, sin = np.cos(s.angle), np.sin(s.angle)
    tip_x, tip_y = s.x + s.length / 2 * cos, s.y + s.length / 2 * sin
    ink = np.clip(s.radius + 0.5 - np.hypot(X - s.disc_x, Y - s.disc_y), 0, 1)
    strokes = [(s.angle, s.length)]
    head = scale * np.floor(s.length / scale / HEAD_SHARE)
    strokes += [(s.angle + turn, head.astype(np.float32)) for turn in (HEAD_ANGLE, -HEAD_ANGLE)]
    for angle, length in strokes:  # each runs from the tip backwards
        along_x, along_y = -np.cos(angle), -np.sin(angle)
        there = np.clip((X - tip_x) * along_x + (Y - tip_y) * along_y, 0, length)
        away = np.hypot(X - tip_x - there * along_x, Y - tip_y - there * along_y)
        ink = np.maximum(ink, np.clip(s.width / 2 + 0.5 - away, 0, 1))
    drawn: np.ndarray = (1 - ink).astype(np.float32)
    return drawn


class _Drawn:
    """Batches of one stream of pictures."""

    def __init__(
        self, image_size: int, scale: float, channels: int, batch_size: int, seed: int, per_epoch: int, stream: int
    ):  # fmt: skip
        self.image_size, self.scale, self.channels = image_size, scale, channels
        self.batch_size, self.seed, self.per_epoch, self.stream = batch_size, seed, per_epoch, stream

    def steps(self, world: int) -> int:
        """Full steps in training, all in validation."""
        each = self.batch_size * world
        return self.per_epoch // each if self.stream == TRAINING else -(-self.per_epoch // each)

    def batch(self, epoch: int, step: int, rank: int, world: int) -> Batch:
        """Pictures rank, rank + world, ... of the step's."""
        numbers = (step * self.batch_size + np.arange(self.batch_size)) * world + rank
        scene = scenes(Draws(self.seed, self.stream, epoch * self.per_epoch + numbers), self.image_size, self.scale)
        images = torch.from_numpy(draw(scene, self.image_size, self.scale))
        labels = np.where(numbers < self.per_epoch, scene.label.astype(np.int64), IGNORE)
        return {
            "images": images.unsqueeze(1).repeat(1, self.channels, 1, 1),
            "labels": torch.from_numpy(labels),
        }
