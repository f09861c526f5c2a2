"""What all tasks share: the update's mean and scale, steps that are skipped, rows of numbers, the run's state."""

import math
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from zoo.checkpoint import IN_TRAINER, describe
from zoo.errors import UserError
from zoo.layers.dropout import set_streams
from zoo.layers.mixer import Solver
from zoo.train.clock import Clock
from zoo.train.optim import Limits, Recipe, gradients, set_lr
from zoo.train.tasks.contract import Batch, TaskContract
from zoo.train.tasks.finite import all_finite, whole
from zoo.train.tasks.losses import weighted_row
from zoo.train.tasks.refusals import refuse_other_model, refuse_uneven_steps, refuse_unknown_counts

__all__ = ["LOSS_UNIT", "Batch", "Task"]

# Gradients are those of (sum of the losses) / LOSS_UNIT until the true count of scored targets is known, just before
# the update. Any constant would do; a power of two is exact, and about a batch's worth of tokens keeps them near 1.
LOSS_UNIT = 4096.0


class Task(TaskContract):
    """The mean loss over the scored targets of a whole update, whatever its micro-batches, ranks and padding.

    Every rank and micro-batch adds the gradient of its summed loss; the sum is divided once by the number of scored
    targets of all of them. So the update does not depend on how its tokens were cut. A step whose loss or gradient is
    not finite changes nothing (the optimiser's state included) and is counted; nothing here waits for the device.

    What a task says of itself stands in `TaskContract`: its losses, its metrics, the unit of its throughput. Several
    losses are each a mean over a count of their own, that of the whole update on all ranks. The counts are exchanged
    before the backward pass; where several batches make an update, the task says them ahead (`counts`).

    Args:
        model: follows the model contract, `model(tokens, cu_seqlens=...) -> (logits, state)`.
        optim: the optimiser's recipe.
        limits: when training ends; the schedule runs against it.
        data: the data module, for tasks that ask it something.
        max_nonfinite_steps: give up after so many skipped steps in a row. On a CPU this is checked at every step,
            elsewhere whenever metrics are logged.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: Recipe,
        limits: Limits,
        data: LightningDataModule | None = None,
        *,
        max_nonfinite_steps: int = 10,
    ) -> None:
        super().__init__(model)
        if max_nonfinite_steps < 1:
            raise UserError(f"task.max_nonfinite_steps must be at least 1, got {max_nonfinite_steps}")
        self.optim = optim
        self.limits = limits
        self.max_nonfinite_steps = max_nonfinite_steps
        self.metrics: tuple[str, ...] = ()  # of "bits_per_byte", "perplexity": what rows say of training, too
        self.clock = Clock()
        self.lr = 0.0
        # Sums on the device, read only when metrics are logged. They are part of the run's state, not of the model.
        self._update = torch.zeros(4)  # this update's [nll, scored targets, bytes, units] on this rank
        self._window = torch.zeros(5)  # since the last row: [nll, scored targets, bytes, gradient norm, good steps]
        self._skipped = torch.zeros(2, dtype=torch.int64)  # skipped steps: [in all, in a row until now]
        self._units = torch.zeros((), dtype=torch.int64)  # units in since the speed was last read, on all ranks
        self._since = 0.0  # when it was last read
        self._pause = 0.0  # seconds since then that were not training

    def configure_model(self) -> None:
        """Let a strategy that cuts weights across ranks cut the model's; Lightning may ask more than once."""
        shard_weights = getattr(self.trainer.strategy, "shard_weights", None)
        if shard_weights is not None:
            shard_weights(self.model)

    # -- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Add the batch's summed loss to this update."""
        batch = self.prepared(batch, batch_idx, training=True)
        nll, scored = self._several(batch) if self.loss_names else self.batch_loss(batch)
        units = scored.new_full((), self.units(batch))
        n_bytes = batch.get("n_bytes", scored.new_zeros(()))
        self._update += torch.stack([x.float() for x in (nll.detach(), scored, n_bytes, units)])
        # Lightning divides by the number of micro-batches; `configure_gradient_clipping` knows the right divisor.
        return nll * (self.trainer.accumulate_grad_batches / LOSS_UNIT)

    def _several(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The weighted sum of the losses, each over its count in the whole update; so no count is left to divide by."""
        totals, counts = self._losses.add(self.losses(batch))
        everywhere = self._losses.ahead
        if everywhere is None:
            refuse_unknown_counts(self.trainer.accumulate_grad_batches)
            everywhere = self._summed(counts)
        return self._losses.weighted(totals, everywhere), torch.zeros_like(counts[0])

    def look_ahead(self, batches: Sequence[Batch]) -> None:
        """Take the counts of the batches of the next update, whole ones as the data give them."""
        counts = self._losses.counted([self.counts(batch) for batch in batches])
        kwargs = self.trainer.distributed_sampler_kwargs  # ranks that share a sample all know its counts
        sharing = 1 if kwargs is None else self.trainer.world_size // int(kwargs["num_replicas"])
        self._losses.ahead = self._summed(counts.to(self.device)) // sharing

    def _summed(self, counts: Tensor) -> Tensor:
        """Over all ranks."""
        if self.trainer.world_size == 1:
            return counts
        summed: Tensor = self.trainer.strategy.reduce(counts.clone(), reduce_op="sum")
        return summed

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Turn summed gradients into the mean's, clip them, and tell the optimiser to skip what is not finite."""
        inner: Any = getattr(optimizer, "optimizer", optimizer)  # Lightning's wrapper keeps attributes to itself
        totals = self._summed(torch.cat([self._update, self._losses.update.flatten()]))
        totals, units, losses = totals[:3], totals[3], totals[4:].unflatten(0, (-1, 2))
        self._units += units.long()
        grads = gradients(inner)
        # Data-parallel strategies average over ranks; the mean over tokens wants the sum.
        scale = self.trainer.world_size * LOSS_UNIT / totals[1].clamp(min=1.0)
        norm = whole(torch.nn.utils.get_total_norm(grads)) * scale
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
        self._losses.close(losses, bad)
        if self.device.type == "cpu":
            self.refuse_nonfinite()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate of this update: a pure function of the step and the clock."""
        step = self.trainer.global_step
        self.lr = self.optim.lr_at(step, self.limits.progress(step, self.clock.now))
        set_lr(optimizer, self.lr)

    def refuse_nonfinite(self) -> None:
        """Give up when the last steps were all skipped."""
        self._losses.refuse_miscounted()
        in_a_row = int(self._skipped[1])
        if in_a_row >= self.max_nonfinite_steps:
            raise UserError(
                f"the loss or its gradient was not finite for {in_a_row} steps in a row, up to step "
                f"{self.trainer.global_step + 1}; lower optim.lr or look for bad input (the checkpoints are kept)"
            )

    def weights_are_finite(self) -> bool:
        """Whether every weight is a finite number; waits for the device once. Same on all ranks."""
        return all_finite(p.detach() for p in self.model.parameters())

    def fault(self, val_loss: float) -> str | None:
        """What makes the model of a finished run useless by not being finite; None where nothing does.

        Weights may be finite and so large that no gradient is: then all steps since they grew so were skipped. Such a
        run of few steps ends before `max_nonfinite_steps`. It is useless where these are half of all its steps.
        Waits for the device once. The same on all ranks where val_loss is.
        """
        if not self.weights_are_finite():
            return "the model's weights"
        if not math.isfinite(val_loss):
            return "the validation loss"
        in_a_row, steps = int(self._skipped[1]), self.trainer.global_step
        if in_a_row and 2 * in_a_row >= steps:
            return f"the loss or its gradient in the last {in_a_row} of {steps} steps"
        return None

    def refuse_nonfinite_weights(self) -> None:
        """Give up when a weight is not finite: no later step can mend it, and nobody wants it kept."""
        if not self.weights_are_finite():
            raise UserError(
                f"the model's weights are not finite after step {self.trainer.global_step}; lower optim.lr and start a "
                "new run (the checkpoints from before are kept)"
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The recipe's optimiser; the schedule needs no object of its own."""
        return self.optim.build(self.model)

    # -- validation ---------------------------------------------------------------------------------------------

    def on_validation_epoch_end(self) -> None:
        """Publish the metrics to Lightning (for callbacks that monitor one) and start afresh."""
        self.log_dict(self.validation_row(), logger=False, sync_dist=self.trainer.world_size > 1)
        self.val_loss.reset()
        metrics: list[Any] = [*self.val_losses.values(), *self.val_metrics.values()]
        for metric in metrics:
            metric.reset()

    # -- what is measured ---------------------------------------------------------------------------------------

    @property
    def columns(self) -> list[str]:
        """The names of all numbers that a row can hold, in order."""
        speed = ["lr", "grad_norm", f"{self.unit}s_per_second", "elapsed", "skipped_steps"]
        train = ["loss", *(m for m in ("bits_per_byte", "perplexity") if m in self.metrics)]
        if self._solvers:
            speed.append("residual")
        train[1:1] = losses = [f"loss_{name}" for name in self.loss_names]
        return [*train, *speed, *(f"val_{name}" for name in ("loss", *losses, *self.val_metrics))]

    def training_row(self) -> dict[str, float]:
        """The numbers since the last call; reads the device."""
        nll, scored, n_bytes, norms, steps = self._window.tolist()
        loss = nll / scored if scored else math.nan
        row = self._losses.row() if self.loss_names else {"loss": loss}
        if "bits_per_byte" in self.metrics:
            row["bits_per_byte"] = nll / (math.log(2) * n_bytes) if n_bytes else math.nan
        if "perplexity" in self.metrics:
            row["perplexity"] = math.exp(min(loss, 700.0))  # exp(709.8) overflows
        row |= {
            "lr": self.lr,
            "grad_norm": norms / steps if steps else math.nan,
            f"{self.unit}s_per_second": self._speed(),
            "elapsed": self.clock.elapsed(),
            "skipped_steps": int(self._skipped[0]),
        }
        row |= self._residuals()
        self._window.zero_()
        self.refuse_nonfinite()
        return row

    def watch(self, on: bool) -> None:
        """Let layers that solve for their states measure how well they did, at the cost of one evaluation each."""
        for layer in self._solvers.values():
            layer.watched = on

    @cached_property
    def _solvers(self) -> dict[str, Solver]:
        """Those layers, by name."""
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, Solver)}

    def _residuals(self) -> dict[str, float]:
        """The newest that was measured: the largest, and that of each layer (metrics.csv has the first alone)."""
        solvers = self._solvers.items()
        each = {f"residual/{name}": float(layer.residual) for name, layer in solvers if layer.residual is not None}
        return {"residual": max(each.values()), **each} if each else {}

    def validation_row(self) -> dict[str, float]:
        """The validation metrics so far, over all ranks."""
        row = {"loss": float(self.val_loss.compute())} if not self.loss_names else self._several_row()
        metrics: dict[str, Any] = dict(self.val_metrics.items())
        row |= {name: float(metric.compute()) for name, metric in metrics.items()}
        return {f"val_{name}": value for name, value in row.items()}

    def _several_row(self) -> dict[str, float]:
        means: dict[str, Any] = dict(self.val_losses.items())
        return weighted_row({name: float(mean.compute()) for name, mean in means.items()}, self._losses.weights)

    def _speed(self) -> float:
        """Units per second of training since the last call, over all ranks, pauses left out."""
        now = time.monotonic()
        seconds = max(now - self._since - self._pause, 1e-9)
        speed = int(self._units) / seconds
        self._since, self._pause = now, 0.0
        self._units.zero_()
        return speed

    def pause(self, seconds: float) -> None:
        """Take time that was not training (validation, a sample, a checkpoint) out of the speed."""
        self._pause += seconds

    # -- state --------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Put the sums on the device and start the clocks; dropout draws by the rank of the data."""
        kwargs = self.trainer.distributed_sampler_kwargs  # ranks that share a sample drop the same numbers
        set_streams(self.model, 0 if kwargs is None else int(kwargs["rank"]))
        self._update, self._window, self._skipped, self._units = (
            t.to(self.device) for t in (self._update, self._window, self._skipped, torch.zeros_like(self._units))
        )
        self._losses.to(self.device)
        if self.loss_names:
            refuse_uneven_steps(self.trainer.strategy, type(self).__name__)
        self._since, self._pause = time.monotonic(), 0.0
        self.clock.start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the next row needs, and what the model is, so that `zoo generate` can read an unfinished run."""
        checkpoint[IN_TRAINER] = describe(self.model)
        checkpoint["zoo"] = {
            "elapsed": self.clock.elapsed(),
            "window": self._window.cpu(),
            "skipped": self._skipped.cpu(),
        }
        if self.loss_names:
            checkpoint["zoo"]["losses"] = self._losses.window.cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again.

        Raises:
            UserError: the checkpoint is of another model than the run's config describes.
        """
        refuse_other_model(describe(self.model), checkpoint[IN_TRAINER])
        state = checkpoint["zoo"]
        self.clock.now = state["elapsed"]
        self._window, self._skipped = state["window"].clone(), state["skipped"].clone()
        if self.loss_names:
            self._losses.window = state["losses"].clone()
