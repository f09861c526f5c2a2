"""Masked-token prediction: some tokens are hidden, and a model that sees both sides says what they were."""

from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import UserError
from zoo.ops import shard
from zoo.train.metrics import IGNORED, Accuracy
from zoo.train.optim import Limits, Recipe
from zoo.train.tasks.draws import draws
from zoo.train.tasks.losses import summed_loss
from zoo.train.tasks.refusals import refuse_classes
from zoo.train.tasks.task import Batch, Task

__all__ = ["MaskedLanguageModelling"]

MASKED, REPLACED = 0.8, 0.1  # of the chosen tokens; the rest stays as it is (BERT, arXiv 1810.04805, section 3.1)


class MaskedLanguageModelling(Task):
    """Mean cross entropy of the chosen tokens, of which 80 % show the mask symbol, 10 % another token, 10 % themselves.

    Every token is chosen with the same probability, but for the symbols between documents. What is chosen is a pure
    function of the seed, the batch's number, the position and the rank of the data, so that a resumed run hides the
    same tokens, and every validation the same as the one before. The mask symbol is the tokenizer's own where it has
    one, else the id behind the data's vocabulary.

    Args:
        model: sees both sides, `model.encode(tokens, mask=..., cu_seqlens=...) -> (hidden, None)`, with `head` and
            `head_loss`.
        optim: the optimiser's recipe.
        limits: when training ends; the schedule runs against it.
        data: text, whose targets say which positions hold a token.
        mask_rate: probability of a token to be chosen in training.
        val_mask_rate: the same in validation; 0.15 everywhere, so that losses are comparable.
        seed: of what is chosen.
        max_nonfinite_steps: give up after so many skipped steps in a row.

    Raises:
        UserError: the model is causal, or predicts no tokens, or a rate is not in (0, 1].
    """

    metric_classes = (Accuracy,)

    def __init__(
        self,
        model: nn.Module,
        optim: Recipe,
        limits: Limits,
        data: Any,
        *,
        mask_rate: float = 0.3,
        val_mask_rate: float = 0.15,
        seed: int = 0,
        max_nonfinite_steps: int = 10,
    ) -> None:
        name = getattr(model, "name", "this model")
        if getattr(model, "causal", True):
            raise UserError(
                f"task=masked_language_modelling hides tokens for a model that sees both sides of them, and {name} "
                "sees only the past; use task=language_modelling"
            )
        if getattr(model, "lm_head", None) is None:
            raise UserError(
                f"task=masked_language_modelling predicts tokens, and {name} has no head for them; leave "
                "model.n_classes out, or use task=classification"
            )
        for key, rate in {"mask_rate": mask_rate, "val_mask_rate": val_mask_rate}.items():
            if not 0 < rate <= 1:
                raise UserError(f"task.{key} must be above 0 and at most 1; got {rate}: BERT has 0.15")
        super().__init__(model, optim, limits, max_nonfinite_steps=max_nonfinite_steps)
        self.rates = {True: mask_rate, False: val_mask_rate}
        self.seed = seed
        self.n_tokens = data.vocab_size  # what a token may be replaced by
        self.mask_id = mask_symbol(data)
        self.never = {self.mask_id, data.tokenizer.eos_id}

    @classmethod
    def fields(cls, data: Any) -> dict[str, Any]:
        """The vocabulary, with room for the mask symbol."""
        refuse_classes("masked_language_modelling", data)
        if "bits_per_byte" not in data.metrics:
            raise UserError(
                f"task=masked_language_modelling hides tokens of text, and {type(data).__name__} is none; use "
                "data=pydocs, text_files or hub"
            )
        return {"vocab_size": max(data.vocab_size, mask_symbol(data) + 1)}

    def prepared(self, batch: Batch, index: int, *, training: bool) -> Batch:
        """Tokens with some hidden, these as targets; "mask" says where there are tokens at all, None when packed."""
        tokens, there = batch["tokens"], batch["targets"] != IGNORED
        sampler = self.trainer.distributed_sampler_kwargs
        draw = draws(self.seed, index, sampler, tokens.device, training=training)
        (rows, length), own = tokens.shape, None
        place = shard.current()
        if place is not None:  # draws are those of the whole row, of which this rank holds a part
            length = length * place.size if place.length is None else place.length
            own = shard.token_indices(length, place.rank, place.size, place.layout or "contiguous").to(tokens.device)
        # float32 by name: under another precision the default is another, and so would be what is hidden
        chance, fate = torch.rand(2, rows, length, generator=draw, device=tokens.device, dtype=torch.float32)
        others = torch.randint(self.n_tokens, (rows, length), generator=draw, device=tokens.device)
        if own is not None:
            chance, fate, others = (z[:, own] for z in (chance, fate, others))
        chosen = there & (chance < self.rates[training])
        for symbol in self.never:
            chosen = chosen & (tokens != symbol)
        hidden = torch.where(fate < MASKED, self.mask_id, torch.where(fate < MASKED + REPLACED, others, tokens))
        made = {"tokens": torch.where(chosen, hidden, tokens), "targets": torch.where(chosen, tokens, IGNORED)}
        if "cu_seqlens" in batch:  # what fills up the row is a document of its own
            return made | {"cu_seqlens": batch["cu_seqlens"]}
        return made | {"mask": there}

    def _chosen(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden vectors (1, n, D) and targets (1, n) of the chosen tokens alone: a sixth or a third of all."""
        encode: Any = self.model.encode
        x = encode(batch["tokens"], mask=batch.get("mask"), cu_seqlens=batch.get("cu_seqlens"))[0]
        chosen = batch["targets"] != IGNORED
        return x[chosen][None], batch["targets"][chosen][None]

    def batch_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss of the chosen tokens of a prepared batch, and their number."""
        x, targets = self._chosen(batch)
        head_loss: Any = self.model.head_loss
        nll: Tensor = head_loss(x, targets, ignore_index=IGNORED, reduction="sum")
        return nll, (targets != IGNORED).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy over the chosen tokens."""
        x, targets = self._chosen(self.prepared(batch, batch_idx, training=False))
        head: Any = self.model.head
        logits = head(x)
        nll, scored = summed_loss(logits, targets)
        self.val_loss.update(nll.float(), scored)
        accuracy: Any = self.val_metrics["accuracy"]
        accuracy.update((logits.argmax(-1) == targets).sum(), scored)


def mask_symbol(data: Any) -> int:
    """The id that hides a token."""
    own: int | None = getattr(data.tokenizer, "mask_id", None)
    return data.vocab_size if own is None else own
