"""From one sequence to another: every token of the target from the source and the target's tokens before it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import UserError
from zoo.layers import EncoderDecoder
from zoo.train.metrics import IGNORED, Accuracy, SequenceAccuracy, count_right
from zoo.train.optim import Limits, Recipe
from zoo.train.tasks.losses import summed_loss
from zoo.train.tasks.showing import evaluating
from zoo.train.tasks.task import Batch, Task

__all__ = ["SequenceToSequence", "decode_greedily"]


class SequenceToSequence(Task):
    """Mean cross entropy of the target's tokens.

    A batch holds "source" (B, S), "source_lengths" (B,), "tokens" (B, T), the target behind a begin symbol, and
    "targets" (B, T), the target and an end symbol, -100 where nothing is scored.

    Validation says the share of right tokens, and of targets that are right as a whole. The latter is that of greedy
    decoding, too: as long as all tokens before were right, the decoder has seen the same.

    Args:
        model: an encoder-decoder, `model(tokens, state, source=..., source_lengths=...) -> (logits, state)`.
        optim: the optimiser's recipe.
        limits: when training ends; the schedule runs against it.
        data: pairs of sequences.
        max_nonfinite_steps: give up after so many skipped steps in a row.

    Raises:
        UserError: the model reads no source.
    """

    metric_classes = (Accuracy, SequenceAccuracy)

    def __init__(
        self, model: nn.Module, optim: Recipe, limits: Limits, data: Any, *, max_nonfinite_steps: int = 10
    ) -> None:
        if not isinstance(model, EncoderDecoder):
            raise UserError(
                f"task=sequence_to_sequence needs a model with an encoder and a decoder, and "
                f"{getattr(model, 'name', 'this model')} is none; use model=encoder_decoder"
            )
        super().__init__(model, optim, limits, max_nonfinite_steps=max_nonfinite_steps)

    @classmethod
    def fields(cls, data: Any) -> dict[str, Any]:
        """The size of the vocabulary of both sequences."""
        if "source" not in getattr(data, "schema", {}):
            raise UserError(
                f"task=sequence_to_sequence needs pairs of sequences, and {type(data).__name__} has none; use "
                "data=reverse"
            )
        return {"vocab_size": data.vocab_size}

    def units(self, batch: Batch) -> int:
        """Tokens of both sequences."""
        return batch["tokens"].numel() + batch["source"].numel()

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, T, vocab) of a batch."""
        logits: Tensor = self.model(
            batch["tokens"], source=batch["source"], source_lengths=batch.get("source_lengths")
        )[0]
        return logits

    def batch_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss and the number of scored targets, without the logits of the batch."""
        model: Any = self.model
        hidden, _ = model.encode(batch["tokens"], source=batch["source"], source_lengths=batch.get("source_lengths"))
        nll: Tensor = model.head_loss(hidden, batch["targets"], ignore_index=IGNORED, reduction="sum")
        return nll, (batch["targets"] != IGNORED).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the loss and the accuracies of validation."""
        logits, targets = self(batch), batch["targets"]
        nll, scored = summed_loss(logits, targets)
        self.val_loss.update(nll.float(), scored)
        right = count_right(logits, targets, None)
        metrics: dict[str, Any] = dict(self.val_metrics.items())
        metrics["accuracy"].update(right.positions, right.scored)
        metrics["sequence_accuracy"].update(right.sequences, right.of_sequences)

    def show(self, model: nn.Module, data: Any, folder: Path, step: int | None = None) -> str | None:
        """One pair of validation, and what greedy decoding makes of its source."""
        batch = {key: value[:1] for key, value in data.sources[1].batch(0, 0, 0, 1).items()}
        assert isinstance(model, EncoderDecoder)
        length, scored = int(batch["source_lengths"][0]), int((batch["targets"][0] != IGNORED).sum())
        decoded = decode_greedily(model, batch["source"], batch["source_lengths"], data.begin, scored)[0]
        at = "" if step is None else f" at step {step}"
        rows = {"source": batch["source"][0, :length], "target": batch["targets"][0, :scored], "decoded": decoded}
        return f"sample{at}:\n" + "\n".join(
            f"  {name:8}{' '.join(map(str, row.tolist()))}" for name, row in rows.items()
        )


def decode_greedily(
    model: EncoderDecoder, source: Tensor, source_lengths: Tensor | None, begin: int, steps: int
) -> Tensor:
    """The most likely token after the most likely ones before it, (B, steps) int64.

    Args:
        model: the encoder-decoder; it is put into eval mode for the call.
        source: (B, S).
        source_lengths: (B,), or None for whole rows.
        begin: the first token that the decoder is given.
        steps: tokens to decode; nothing ends a row earlier.
    """
    with evaluating(model) as device:
        lengths = None if source_lengths is None else source_lengths.to(device)
        state = model.begin(source.to(device), lengths)
        token = torch.full((len(source), 1), begin, device=device)
        decoded = []
        for _ in range(steps):
            logits, state = model(token, state)
            token = logits.argmax(-1)
            decoded.append(token)
    return torch.cat(decoded, dim=1).cpu()
