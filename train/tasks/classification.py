"""Sequence classification: one class for every sequence."""

from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import UserError
from zoo.ops import shard
from zoo.train.metrics import IGNORED, Accuracy
from zoo.train.optim import Limits, Recipe
from zoo.train.tasks.losses import summed_loss
from zoo.train.tasks.task import Batch, Task

__all__ = ["Classification"]


class Classification(Task):
    """Mean cross entropy of the classes of whole sequences.

    A batch holds "tokens" (B, T), "targets" (B,) in [0, n_classes) or -100 where a row only fills up the batch, and
    "mask" (B, T) where rows have different lengths; or packed documents with "cu_seqlens" and one target each.

    Args:
        model: `model(tokens, mask=..., cu_seqlens=...) -> (logits (B, n_classes), None)`.
        optim: the optimiser's recipe.
        limits: when training ends; the schedule runs against it.
        data: labels sequences with one of `n_classes`.
        max_nonfinite_steps: give up after so many skipped steps in a row.

    Raises:
        UserError: the model tells no classes apart.
    """

    metric_classes = (Accuracy,)

    def __init__(
        self, model: nn.Module, optim: Recipe, limits: Limits, data: Any, *, max_nonfinite_steps: int = 10
    ) -> None:
        if getattr(model, "classifier", None) is None:
            raise UserError(
                f"task=classification needs a model that tells classes apart, and {getattr(model, 'name', 'this one')} "
                "predicts tokens; give model.n_classes where the model has that field"
            )
        super().__init__(model, optim, limits, max_nonfinite_steps=max_nonfinite_steps)

    @classmethod
    def fields(cls, data: Any) -> dict[str, Any]:
        """The vocabulary and the number of classes."""
        if getattr(data, "n_classes", None) is None:
            raise UserError(
                f"task=classification needs data that label whole sequences, and {type(data).__name__} does not; use "
                "data=digits"
            )
        return {"vocab_size": data.vocab_size, "n_classes": data.n_classes}

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, n_classes) of a batch."""
        logits: Tensor = self.model(batch["tokens"], mask=batch.get("mask"), cu_seqlens=batch.get("cu_seqlens"))[0]
        return logits

    def batch_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss and the number of labelled sequences."""
        return summed_loss(self(batch), self._scored(batch["targets"]))

    @staticmethod
    def _scored(targets: Tensor) -> Tensor:
        """The targets that this rank scores: of ranks that share sequences each knows all logits, and takes some."""
        place = shard.current()
        if place is None:
            return targets
        rows = torch.arange(len(targets), device=targets.device)
        return targets.where(rows % place.size == place.rank, IGNORED)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the mean loss and to the accuracy of validation."""
        logits, targets = self(batch), self._scored(batch["targets"])
        nll, scored = summed_loss(logits, targets)
        self.val_loss.update(nll.float(), scored)
        accuracy: Any = self.val_metrics["accuracy"]
        accuracy.update(((logits.argmax(-1) == targets) & (targets != IGNORED)).sum(), scored)
