"""Arrow pointing: labels are right by geometry, pictures show the scene, samples depend on their number alone."""

import numpy as np
import pytest
import torch

from zoo.errors import UserError
from zoo.train.data.images.arrow_pointing import ArrowPointing, draw, scenes
from zoo.train.data.synthetic._philox import Draws


@pytest.mark.parametrize(("size", "scale"), [(192, 1.0), (384, 1.0), (64, 1 / 3), (96, 1 / 3)])
def test_labels_are_fair_and_right_by_a_ray_and_a_circle(size: int, scale: float) -> None:
    s = scenes(Draws(0, 0, np.arange(10_000)), size, scale)
    assert abs(s.label.mean() - 0.5) < 0.01
    toward = np.cos(s.angle) * (s.disc_x - s.x) + np.sin(s.angle) * (s.disc_y - s.y)
    past = np.abs(np.cos(s.angle) * (s.disc_y - s.y) - np.sin(s.angle) * (s.disc_x - s.x))
    assert np.array_equal((toward > 0) & (past < s.radius), s.label == 1)
    margin = np.where(s.label == 1, s.radius / 1.2, 1.2 * s.radius)  # none is a close call
    assert np.array_equal((toward > 0) & (past < margin * (1 + 1e-9)), s.label == 1)
    assert min(np.abs(s.disc_x - s.x).min(), np.abs(s.disc_y - s.y).min()) >= 2 * 15 * scale - 1e-9
    assert (s.disc_x - s.radius).min() >= 0
    assert (s.disc_x + s.radius).max() <= size


def test_a_picture_shows_its_scene() -> None:
    s = scenes(Draws(3, 0, np.arange(50)), 192, 1.0)
    images = draw(s, 192, 1.0)
    assert images.min() == 0.0
    assert images.max() == 1.0
    for i in range(50):

        def at(x: float, y: float, i: int = i) -> float:
            return float(images[i, int(y), int(x)])

        assert at(s.disc_x[i], s.disc_y[i]) == 0
        beyond = s.length[i] / 2 - 1
        assert at(s.x[i] + beyond * np.cos(s.angle[i]), s.y[i] + beyond * np.sin(s.angle[i])) < 0.5, "the tip is ink"
        black = (1 - images[i]).sum() - np.pi * s.radius[i] ** 2
        strokes = s.length[i] + 2 * np.floor(s.length[i] / 2.5)
        assert 0.5 * strokes * s.width[i] < black < 1.1 * strokes * s.width[i] + 20
    heads = [  # more ink lies in front of the middle than behind it: one can see where the arrow points
        sum(float(1 - images[i, int(s.y[i] + d * np.sin(s.angle[i] + t)), int(s.x[i] + d * np.cos(s.angle[i] + t))])
            for d in range(2, int(s.length[i] / 2)) for t in (-0.25, 0.25))
        - sum(float(1 - images[i, int(s.y[i] - d * np.sin(s.angle[i] + t)), int(s.x[i] - d * np.cos(s.angle[i] + t))])
              for d in range(2, int(s.length[i] / 2)) for t in (-0.25, 0.25))
        for i in range(50)
    ]  # fmt: skip
    assert np.mean(np.array(heads) > 0) > 0.9


def test_a_sample_depends_on_its_number_alone() -> None:
    data = ArrowPointing(image_size=64, object_scale=1 / 3, batch_size=8, train_samples=32, val_samples=10, seed=5)
    train, val = data.sources
    assert (train.steps(1), train.steps(2), val.steps(1)) == (4, 2, 2)
    whole = train.batch(0, 0, 0, 1)
    assert whole["images"].shape == (8, 3, 64, 64)
    parts = [train.batch(0, 0, rank, 2)["images"][:4] for rank in (0, 1)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole["images"])
    assert torch.equal(train.batch(0, 0, 0, 1)["images"], whole["images"])
    assert not torch.equal(train.batch(1, 0, 0, 1)["images"], whole["images"]), "another epoch has other pictures"
    assert not torch.equal(val.batch(0, 0, 0, 1)["images"], whole["images"])
    assert val.batch(0, 1, 0, 1)["labels"].tolist()[2:] == [-100] * 6


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"need data\.image_size of at least 180; got 64"):
        ArrowPointing(image_size=64)
    with pytest.raises(UserError, match=r"object_scale must be above 0"):
        ArrowPointing(object_scale=0.0)
    with pytest.raises(UserError, match="train_samples"):
        ArrowPointing(train_samples=4)
