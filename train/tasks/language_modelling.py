"""Next-token prediction."""

import itertools
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from zoo.errors import UserError
from zoo.layers import Model, SequenceModel
from zoo.train.contracts import tokenizer_of
from zoo.train.metrics import (
    IGNORED,
    Accuracy,
    BitsPerByte,
    LastAccuracy,
    Perplexity,
    SequenceAccuracy,
    count_right,
)
from zoo.train.optim import Limits, Recipe
from zoo.train.tasks.losses import summed_loss
from zoo.train.tasks.refusals import refuse_classes
from zoo.train.tasks.sample_text import sample_text
from zoo.train.tasks.task import Batch, Task

__all__ = ["LanguageModelling"]


class MeasuredInBytes(Protocol):
    """Data that say what they can be judged by, of "bits_per_byte", "perplexity", "accuracy", "last_accuracy"."""

    metrics: tuple[Any, ...]


class LanguageModelling(Task):
    """Mean cross entropy of the next token.

    Args:
        model: causal, `model(tokens, cu_seqlens=...) -> (logits, state)`.
        optim: the optimiser's recipe.
        limits: when training ends; the schedule runs against it.
        data: the data module, asked only for its metrics and its validation sets.
        max_nonfinite_steps: give up after so many skipped steps in a row.

    Raises:
        UserError: the model sees the token that it has to predict.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: Recipe,
        limits: Limits,
        data: MeasuredInBytes,
        *,
        max_nonfinite_steps: int = 10,
    ) -> None:
        if not getattr(model, "causal", True):
            raise UserError(
                f"task=language_modelling predicts the next token, and {getattr(model, 'name', 'this model')} sees it: "
                "both sides of every token reach its output; use task=masked_language_modelling"
            )
        inputs = model.inputs if isinstance(model, Model) else ()
        others = [each.name for each in inputs if not each.optional and each.name != "tokens"]
        if others:
            raise UserError(
                f"task=language_modelling has tokens alone, and {getattr(model, 'name', 'this model')} takes "
                f"{', '.join(others)} as well; choose the task that it is for"
            )
        super().__init__(model, optim, limits, max_nonfinite_steps=max_nonfinite_steps)
        self.metrics = tuple(data.metrics)
        if "bits_per_byte" in self.metrics:
            self.val_metrics["bits_per_byte"] = BitsPerByte()
        if "perplexity" in self.metrics:
            self.val_metrics["perplexity"] = Perplexity()
        # every accuracy over all validation data, and again for each set of them that has a name
        self._sets = ("", *(f"_at_{name}" for name in getattr(data, "val_sets", ())))
        for where in self._sets:
            if "accuracy" in self.metrics:
                self.val_metrics[f"accuracy{where}"] = Accuracy()
                self.val_metrics[f"sequence_accuracy{where}"] = SequenceAccuracy()
            if "last_accuracy" in self.metrics:
                self.val_metrics[f"last_accuracy{where}"] = LastAccuracy()

    @classmethod
    def fields(cls, data: Any) -> dict[str, Any]:
        """The model's field that the data decide: the size of the vocabulary."""
        refuse_classes("language_modelling", data)
        return {"vocab_size": data.vocab_size}

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, T, vocab) of a batch."""
        logits: Tensor = self.model(batch["tokens"], cu_seqlens=batch.get("cu_seqlens"))[0]
        return logits

    def batch_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The batch's summed loss and the number of scored targets; no logits where the model can do without them."""
        head_loss = getattr(self.model, "head_loss", None)
        if head_loss is None:
            return summed_loss(self(batch), batch["targets"])
        model: Any = self.model
        tokens, cuts = batch["tokens"], batch.get("cu_seqlens")
        if isinstance(model, SequenceModel):  # whose states need not be held
            hidden = model.hidden(tokens, cu_seqlens=cuts)
        else:
            hidden = model.encode(tokens, cu_seqlens=cuts)[0]
        nll: Tensor = head_loss(hidden, batch["targets"], ignore_index=IGNORED, reduction="sum")
        return nll, (batch["targets"] != IGNORED).sum()

    def show(self, model: nn.Module, data: Any, folder: Path, step: int | None = None) -> str | None:
        """A text that begins a document, where the data are text."""
        tokenizer = tokenizer_of(data)
        if tokenizer is None:
            return None
        return f"sample{'' if step is None else f' at step {step}'}:\n{sample_text(model, tokenizer)}"

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch to the validation metrics."""
        targets = batch["targets"]
        metrics: dict[str, Any] = dict(self.val_metrics.items())
        judged = "accuracy" in metrics or "last_accuracy" in metrics
        if judged:  # which needs the logits
            logits = self(batch)
            nll, scored = summed_loss(logits, targets)
        else:
            nll, scored = self.batch_loss(batch)
        nll = nll.float()
        self.val_loss.update(nll, scored)
        if "bits_per_byte" in metrics:
            metrics["bits_per_byte"].update(nll, batch["n_bytes"])
        if "perplexity" in metrics:
            metrics["perplexity"].update(nll, scored)
        if judged:
            right = count_right(logits, targets, batch.get("cu_seqlens"))
            ratios = {
                "accuracy": (right.positions, right.scored),
                "sequence_accuracy": (right.sequences, right.of_sequences),
                "last_accuracy": (right.last, right.of_sequences),
            }
            sets = self._sets[:1]
            if "val_set" in batch:
                sets += (self._sets[1 + int(batch["val_set"])],)
            for name, where in itertools.product(ratios, sets):
                if name + where in metrics:
                    metrics[name + where].update(*ratios[name])
