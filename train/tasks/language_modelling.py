"""Next-token prediction: the loss, the gradient's scale, what is measured."""

import math
import time
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.checkpoint import IN_TRAINER, describe
from zoo.errors import UserError
from zoo.layers import SequenceModel
from zoo.train.clock import Clock
from zoo.train.metrics import (
    IGNORED,
    Accuracy,
    BitsPerByte,
    MeanLoss,
    Perplexity,
    SequenceAccuracy,
    count_right,
)
from zoo.train.optim import AdamW, Limits, gradients, set_lr

__all__ = ["LanguageModelling"]

# Gradients are those of (sum of the losses) / LOSS_UNIT until the true count of scored targets is known, just before
# the update. Any constant would do; a power of two is exact, and about a batch's worth of tokens keeps them near 1.
LOSS_UNIT = 4096.0


class Measured(Protocol):
    """Data that say what they can be judged by, of "bits_per_byte", "perplexity", "accuracy"."""

    metrics: tuple[Any, ...]


class LanguageModelling(LightningModule):
    """Mean cross entropy over the scored targets of a whole update, whatever its micro-batches, ranks and padding.

    Every rank and micro-batch adds the gradient of its summed loss; the sum is divided once by the number of scored
    targets of all of them. So the update does not depend on how its tokens were cut. A step whose loss or gradient is
    not finite changes nothing (the optimiser's state included) and is counted; nothing here waits for the device.

    Args:
        model: follows the model contract, `model(tokens, cu_seqlens=...) -> (logits, state)`.
        optim: the optimiser's recipe.
        limits: when training ends; the schedule runs against it.
        data: the data module, asked only for its metrics.
        max_nonfinite_steps: give up after so many skipped steps in a row. On a CPU this is checked at every step,
            elsewhere whenever metrics are logged.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: AdamW,
        limits: Limits,
        data: Measured,
        *,
        max_nonfinite_steps: int = 10,
    ) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.limits = limits
        self.metrics: tuple[str, ...] = tuple(data.metrics)
        self.max_nonfinite_steps = max_nonfinite_steps
        self.clock = Clock()
        self.lr = 0.0
        self.val_loss = MeanLoss()
        self.val_metrics = nn.ModuleDict()
        if "bits_per_byte" in self.metrics:
            self.val_metrics["bits_per_byte"] = BitsPerByte()
        if "perplexity" in self.metrics:
            self.val_metrics["perplexity"] = Perplexity()
        if "accuracy" in self.metrics:
            self.val_metrics["accuracy"] = Accuracy()
            self.val_metrics["sequence_accuracy"] = SequenceAccuracy()
        # Sums on the device, read only when metrics are logged. They are part of the run's state, not of the model.
        self._update = torch.zeros(3)  # this update's [nll, scored targets, bytes] on this rank
        self._window = torch.zeros(5)  # since the last row: [nll, scored targets, bytes, gradient norm, good steps]
        self._skipped = torch.zeros(2, dtype=torch.int64)  # skipped steps: [in all, in a row until now]
        self._tokens = 0  # tokens in since the speed was last read, on this rank
        self._since = 0.0  # when it was last read
        self._pause = 0.0  # seconds since then that were not training

    # -- training -----------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits (B, T, vocab) of a batch."""
        logits: Tensor = self.model(batch["tokens"], cu_seqlens=batch.get("cu_seqlens"))[0]
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Add the batch's summed loss to this update."""
        nll, scored = self.batch_loss(batch)
        n_bytes = batch.get("n_bytes")
        self._update += torch.stack(
            [nll.detach().float(), scored.float(), n_bytes.float() if n_bytes is not None else scored.new_zeros(())]
        )
        self._tokens += batch["tokens"].numel()
        # Lightning divides by the number of micro-batches; `configure_gradient_clipping` knows the right divisor.
        return nll * (self.trainer.accumulate_grad_batches / LOSS_UNIT)

    def batch_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
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

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Turn summed gradients into the mean's, clip them, and tell the optimiser to skip what is not finite."""
        inner: Any = getattr(optimizer, "optimizer", optimizer)  # Lightning's wrapper keeps attributes to itself
        totals: Tensor = self._update
        if self.trainer.world_size > 1:
            totals = self.trainer.strategy.reduce(totals, reduce_op="sum")
        grads = gradients(inner)
        # Data-parallel strategies average over ranks; the mean over tokens wants the sum.
        scale = self.trainer.world_size * LOSS_UNIT / totals[1].clamp(min=1.0)
        norm = torch.nn.utils.get_total_norm(grads) * scale
        bad = ~(torch.isfinite(norm) & torch.isfinite(totals[0]))
        if gradient_clip_val:
            scale = scale * (gradient_clip_val / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, scale.to(grads[0].dtype))
        inner.found_inf = bad.float()  # as torch.amp.GradScaler tells it

        step = torch.cat([totals, norm[None].float(), torch.ones_like(totals[:1])])
        self._window += torch.where(bad, torch.zeros_like(step), step)
        self._skipped[0] += bad
        self._skipped[1] = (self._skipped[1] + 1) * bad
        self._update.zero_()
        if self.device.type == "cpu":
            self.refuse_nonfinite()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate of this update: a pure function of the step and the clock."""
        step = self.trainer.global_step
        self.lr = self.optim.lr_at(step, self.limits.progress(step, self.clock.now))
        set_lr(optimizer, self.lr)

    def refuse_nonfinite(self) -> None:
        """Give up when the last steps were all skipped."""
        in_a_row = int(self._skipped[1])
        if in_a_row >= self.max_nonfinite_steps:
            raise UserError(
                f"the loss or its gradient was not finite for {in_a_row} steps in a row, up to step "
                f"{self.trainer.global_step + 1}; lower optim.lr or look for bad input (the checkpoints are kept)"
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The recipe's optimiser; the schedule needs no object of its own."""
        return self.optim.build(self.model)

    # -- validation ---------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add the batch to the validation metrics."""
        targets = batch["targets"]
        metrics: dict[str, Any] = dict(self.val_metrics.items())
        if "accuracy" in metrics:  # which needs the logits
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
        if "accuracy" in metrics:
            right, n, right_sequences, n_sequences = count_right(logits, targets, batch.get("cu_seqlens"))
            metrics["accuracy"].update(right, n)
            metrics["sequence_accuracy"].update(right_sequences, n_sequences)

    def on_validation_epoch_end(self) -> None:
        """Publish the metrics to Lightning (for callbacks that monitor one) and start afresh."""
        self.log_dict(self.validation_row(), logger=False, sync_dist=self.trainer.world_size > 1)
        self.val_loss.reset()
        metrics: dict[str, Any] = dict(self.val_metrics.items())
        for metric in metrics.values():
            metric.reset()

    # -- what is measured ---------------------------------------------------------------------------------------

    @property
    def columns(self) -> list[str]:
        """The names of all numbers that a row can hold, in order."""
        speed = ["lr", "grad_norm", "tokens_per_second", "elapsed", "skipped_steps"]
        train = ["loss", *(m for m in ("bits_per_byte", "perplexity") if m in self.metrics)]
        return [*train, *speed, "val_loss", *(f"val_{name}" for name in self.val_metrics)]

    def training_row(self) -> dict[str, float]:
        """The numbers since the last call; reads the device."""
        nll, scored, n_bytes, norms, steps = self._window.tolist()
        loss = nll / scored if scored else math.nan
        row = {"loss": loss}
        if "bits_per_byte" in self.metrics:
            row["bits_per_byte"] = nll / (math.log(2) * n_bytes) if n_bytes else math.nan
        if "perplexity" in self.metrics:
            row["perplexity"] = math.exp(min(loss, 700.0))  # exp(709.8) overflows
        row |= {
            "lr": self.lr,
            "grad_norm": norms / steps if steps else math.nan,
            "tokens_per_second": self._speed(),
            "elapsed": self.clock.elapsed(),
            "skipped_steps": int(self._skipped[0]),
        }
        self._window.zero_()
        self.refuse_nonfinite()
        return row

    def validation_row(self) -> dict[str, float]:
        """The validation metrics so far, over all ranks."""
        row = {"val_loss": float(self.val_loss.compute())}
        metrics: dict[str, Any] = dict(self.val_metrics.items())
        return row | {f"val_{name}": float(metric.compute()) for name, metric in metrics.items()}

    def _speed(self) -> float:
        """Tokens per second of training since the last call, over all ranks, pauses left out."""
        now = time.monotonic()
        seconds = max(now - self._since - self._pause, 1e-9)
        speed = self._tokens * self.trainer.world_size / seconds
        self._tokens, self._since, self._pause = 0, now, 0.0
        return speed

    def pause(self, seconds: float) -> None:
        """Take time that was not training (validation, a sample, a checkpoint) out of the speed."""
        self._pause += seconds

    # -- state --------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Put the sums on the device and start the clocks."""
        self._update, self._window, self._skipped = (
            t.to(self.device) for t in (self._update, self._window, self._skipped)
        )
        self._since, self._tokens, self._pause = time.monotonic(), 0, 0.0
        self.clock.start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the next row needs, and what the model is, so that `zoo generate` can read an unfinished run."""
        checkpoint[IN_TRAINER] = describe(self.model)
        checkpoint["zoo"] = {
            "elapsed": self.clock.elapsed(),
            "window": self._window.cpu(),
            "skipped": self._skipped.cpu(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again."""
        state = checkpoint["zoo"]
        self.clock.now = state["elapsed"]
        self._window, self._skipped = state["window"].clone(), state["skipped"].clone()


def summed_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy summed over the scored targets, in float32 or better, and their number."""
    logits = logits.flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss, (targets != IGNORED).sum()
