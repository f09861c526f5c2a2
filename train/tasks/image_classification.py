"""Classification of pictures: one class for each."""

from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import UserError
from zoo.layers import VisionModel
from zoo.ranges import Range
from zoo.train.metrics import IGNORED, Accuracy
from zoo.train.optim import Limits, Recipe
from zoo.train.picture_sheet import draw_sheet
from zoo.train.tasks.showing import evaluating
from zoo.train.tasks.task import Batch, Task

__all__ = ["ImageClassification"]

SHOWN = 40  # pictures of a sheet


class ImageClassification(Task):
    """Mean cross entropy of the classes of pictures.

    A batch holds "images" (B, C, H, W) and "labels" (B,) in [0, n_classes), -100 where a row only fills up the batch.

    Args:
        model: `model(images=...) -> (logits (B, n_classes), None)`.
        optim: the optimiser's recipe.
        limits: when training ends; the schedule runs against it.
        data: pictures with one of `n_classes` each, of `channels` channels and `image_size` rows and columns.
        label_smoothing: the share of a target that all classes have alike, in training (arXiv 1512.00567).
        max_nonfinite_steps: give up after so many skipped steps in a row.

    Raises:
        UserError: the model takes no pictures, or none of this kind.
    """

    unit = "image"
    metric_classes = (Accuracy,)

    def __init__(
        self,
        model: nn.Module,
        optim: Recipe,
        limits: Limits,
        data: Any,
        *,
        label_smoothing: Annotated[float, Range(0, below=1)] = 0.0,
        max_nonfinite_steps: int = 10,
    ) -> None:
        refuse_unless_vision(model, data)
        super().__init__(model, optim, limits, max_nonfinite_steps=max_nonfinite_steps)
        self.label_smoothing = label_smoothing

    @classmethod
    def fields(cls, data: Any) -> dict[str, Any]:
        """The number of classes."""
        if getattr(data, "image_size", None) is None:
            raise UserError(
                f"task=image_classification needs pictures with labels, and {type(data).__name__} has none; use "
                "data=digits_images"
            )
        return {"n_classes": data.n_classes}

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, n_classes) of a batch."""
        logits: Tensor = self.model(images=batch["images"])[0]
        return logits

    def batch_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss and the number of labelled pictures."""
        return self._loss(self(batch), batch["labels"], self.label_smoothing)

    def _loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
        return loss, (labels != IGNORED).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the mean loss and to the accuracy of validation."""
        logits, labels = self(batch), batch["labels"]
        nll, scored = self._loss(logits, labels)
        self.val_loss.update(nll.float(), scored)
        accuracy: Any = self.val_metrics["accuracy"]
        accuracy.update(((logits.argmax(-1) == labels) & (labels != IGNORED)).sum(), scored)

    def show(self, model: nn.Module, data: Any, folder: Path, step: int | None = None) -> str | None:
        """A sheet of the first validation pictures with what the model takes them for: pictures.png."""
        batch = data.sources[1].batch(0, 0, 0, 1)
        there = batch["labels"] != IGNORED
        images, labels = batch["images"][there][:SHOWN], batch["labels"][there][:SHOWN]
        with evaluating(model) as device:
            guessed = model(images=images.to(device))[0].argmax(-1).cpu()
        path = folder / "pictures.png"
        right = int((guessed == labels).sum())
        titles = [f"{g}" if g == w else f"{g}, not {w}" for g, w in zip(guessed.tolist(), labels.tolist(), strict=True)]
        draw_sheet(path, images, titles, (guessed == labels).tolist())
        at = "" if step is None else f" at step {step}"
        return f"pictures{at}: {right} of {len(labels)} right, {path}"


def refuse_unless_vision(model: nn.Module, data: Any) -> None:
    """Refuse a model that takes no pictures, or not those of the data.

    Raises:
        UserError: it is no VisionModel with a head, or its channels or patches do not fit.
    """
    name = getattr(model, "name", "this model")
    if not isinstance(model, VisionModel):
        raise UserError(f"task=image_classification needs a model of pictures, and {name} is none; use model=vit")
    config = model.config
    if config.features_only:
        raise UserError(
            f"task=image_classification needs classes, and {name} gives maps of features; leave out model.features_only"
        )
    if config.channels != data.channels:
        raise UserError(
            f"the pictures of {type(data).__name__} have {data.channels} channels and model.channels is "
            f"{config.channels}; set model.channels={data.channels}"
        )
    if data.image_size % config.reduction:
        raise UserError(
            f"the patches of {name} stand for {config.reduction} x {config.reduction} pixels, which must divide the "
            f"{data.image_size} of the pictures; set model.patch_size"
        )
