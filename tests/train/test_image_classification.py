"""Classification of pictures on scikit-learn's digits, from the data to what a run shows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

import zoo
from zoo.config import compose
from zoo.errors import UserError
from zoo.layers import VisionModel
from zoo.layers.vision import Features
from zoo.ops.shard import SequenceShard
from zoo.train.data.core.base import Time
from zoo.train.data.images import digits_images
from zoo.train.data.images.digits_images import DigitsImages
from zoo.train.optim import AdamW, Limits
from zoo.train.run import fit
from zoo.train.run.evaluate import evaluate
from zoo.train.strategies.batch import cut
from zoo.train.tasks.image_classification import ImageClassification

sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed")


def settings(*more: str) -> dict[str, Any]:
    return compose(["model=vit", "model.n_layers=1", "trainer.accelerator=cpu", "trainer.log_every=2", *more])


def task_of(**options: Any) -> ImageClassification:
    model = zoo.create_model("vit", n_layers=1)
    return ImageClassification(model, AdamW(), Limits(max_steps=1), DigitsImages(), **options)


def test_batches_are_the_pictures_of_the_file() -> None:
    file = sklearn.datasets.load_digits()
    train, val = DigitsImages(batch_size=32, seed=3).sources
    assert (train.steps(1), val.steps(1), train.steps(2)) == (1437 // 32, 12, 1437 // 64)
    known = {tuple(row): int(label) for row, label in zip(file.data.astype(int), file.target, strict=True)}
    first = train.batch(0, 0, 0, 1)
    assert first["images"].shape == (32, 1, 8, 8)
    assert first["images"].dtype == torch.float32
    pixels = (first["images"] * 16).long().flatten(1)
    assert [known[tuple(row)] for row in pixels.tolist()] == first["labels"].tolist()
    together = torch.stack([train.batch(0, 0, rank, 2)["labels"] for rank in (0, 1)], 1).flatten()
    assert torch.equal(together[:32], first["labels"])
    labels = torch.cat([val.batch(0, step, 0, 1)["labels"] for step in range(12)])
    assert labels[:360].tolist() == file.target[-360:].tolist()
    assert (labels[360:] == -100).all()


def test_the_loss_is_the_mean_over_labelled_pictures() -> None:
    task, batch = task_of(label_smoothing=0.1), DigitsImages(batch_size=8).sources[0].batch(0, 0, 0, 1)
    batch["labels"][3] = -100
    nll, scored = task.batch_loss(batch)
    logits, kept = task(batch), batch["labels"] != -100
    smooth = torch.full((7, 10), 0.01).scatter(1, batch["labels"][kept, None], 0.91)
    torch.testing.assert_close(nll, -(smooth * F.log_softmax(logits[kept], 1)).sum())
    assert int(scored) == 7
    task.validation_step(batch, 0)  # judged without smoothing
    want = F.cross_entropy(logits[kept], batch["labels"][kept])
    torch.testing.assert_close(task.val_loss.compute(), want.detach())
    right = (logits[kept].argmax(1) == batch["labels"][kept]).float().mean()
    assert float(task.val_metrics["accuracy"].compute()) == float(right)  # type: ignore[operator]


def test_a_run_learns_shows_and_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings("trainer.max_steps=60", "trainer.val_every=60", "trainer.sample_every=50", "optim.lr=5e-3")
    run = tmp_path / "run"
    assert fit.run(config, run) == 0
    said = capsys.readouterr().out
    assert "images/s" in said
    assert "pictures at step 50: " in said
    rows = (run / "metrics.csv").read_text().splitlines()
    assert "images_per_second" in rows[0]
    assert "tokens_per_second" not in rows[0]
    picture = (run / "pictures.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    measured = evaluate(run)
    assert measured["accuracy"] > 0.5, "guessing gives 0.1"
    model = zoo.load(run)
    assert isinstance(model, VisionModel)
    assert evaluate(run / "checkpoint") == measured, "a bare checkpoint knows its task and its data"


def test_maps_of_features_are_taken_by_position() -> None:
    model = zoo.create_model("vit", n_layers=3, features_only=True, out_indices=(0, 2))
    out, state = model(images=torch.rand(2, 1, 8, 12))
    assert isinstance(out, Features)
    assert state is None
    assert [tuple(each.shape) for each in out.maps] == [(2, 64, 4, 6)] * 2


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for words, rule in (
        (["model=gla", "task=image_classification", "data=digits_images"], "needs a model with the field n_classes"),
        (["model=vit", "data=pydocs"], "needs pictures with labels, and PyDocs has none"),
        (["model=vit", "model.channels=3"], r"have 1 channels and model\.channels is 3"),
        (["model=vit", "model.patch_size=16", "model.image_size=32"], "must divide the 8 of the pictures"),
        (["model=vit", "model.n_classes=7"], r"model\.n_classes is 7 and the data have 10 classes"),
        (["model=vit", "model.features_only=true"], "gives maps of features"),
    ):
        with pytest.raises(UserError, match=rule):
            fit.run(compose([*words, "trainer.accelerator=cpu"]), tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
    monkeypatch.setattr(digits_images, "load_digits", None)
    with pytest.raises(UserError, match="pip install"):
        DigitsImages().setup()


@pytest.fixture
def second_of_two() -> Iterator[SequenceShard]:
    """A place in a group whose messages go nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield SequenceShard()
    dist.destroy_process_group()


def test_pictures_are_cut_by_rows_of_patches_or_not_at_all(second_of_two: SequenceShard) -> None:
    place = second_of_two
    images = torch.arange(2 * 8 * 3).view(2, 1, 8, 3)
    with pytest.raises(UserError, match="has none that may be cut; use strategy=ddp"):
        cut({"images": images, "labels": torch.zeros(2)}, DigitsImages.schema, place)
    local = cut({"images": images}, {"images": Time(2, unit=2)}, place)
    assert torch.equal(local["images"], images[:, :, 4:])
    with pytest.raises(UserError, match="units of 3, which must divide its size 8"):
        cut({"images": images}, {"images": Time(2, unit=3)}, place)
