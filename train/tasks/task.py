"""What all tasks share: the update's mean and scale, steps that are skipped, rows of numbers, the run's state."""

import math
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from zoo.checkpoint import IN_TRAINER, describe
from zoo.errors import UserError
from zoo.layers.dropout import set_streams
from zoo.layers.mixer import Solver
from zoo.train.clock import Clock
from zoo.train.metrics import IGNORED, MeanLoss
from zoo.train.optim import Limits, Recipe, gradients, set_lr

__all__ = ["LOSS_UNIT", "Task", "summed_loss"]

Batch = dict[str, Tensor]

# Gradients are those of (sum of the losses) / LOSS_UNIT until the true count of scored targets is known, just before
# the update. Any constant would do; a power of two is exact, and about a batch's worth of tokens keeps them near 1.
LOSS_UNIT = 4096.0


class Task(LightningModule):
    """The mean loss over the scored targets of a whole update, whatever its micro-batches, ranks and padding.

    Every rank and micro-batch adds the gradient of its summed loss; the sum is divided once by the number of scored
    targets of all of them. So the update does not depend on how its tokens were cut. A step whose loss or gradient is
    not finite changes nothing (the optimiser's state included) and is counted; nothing here waits for the device.

    A task says what a batch is made into (`prepared`), its loss (`batch_loss`), how a validation batch is judged
    (`validation_step`, into `val_loss` and `val_metrics`), and which fields of a model the data decide (`fields`). It
    may say the `unit` of its throughput and how many a batch has (`units`), and `show` something of the model.

    Args:
        model: follows the model contract, `model(tokens, cu_seqlens=...) -> (logits, state)`.
        optim: the optimiser's recipe.
        limits: when training ends; the schedule runs against it.
        max_nonfinite_steps: give up after so many skipped steps in a row. On a CPU this is checked at every step,
            elsewhere whenever metrics are logged.
    """

    unit = "token"  # of the throughput

    def __init__(self, model: nn.Module, optim: Recipe, limits: Limits, *, max_nonfinite_steps: int = 10) -> None:
        super().__init__()
        if max_nonfinite_steps < 1:
            raise UserError(f"task.max_nonfinite_steps must be at least 1, got {max_nonfinite_steps}")
        self.model = model
        self.optim = optim
        self.limits = limits
        self.max_nonfinite_steps = max_nonfinite_steps
        self.metrics: tuple[str, ...] = ()  # of "bits_per_byte", "perplexity": what rows say of training, too
        self.clock = Clock()
        self.lr = 0.0
        self.val_loss = MeanLoss()
        self.val_metrics = nn.ModuleDict()
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

    # -- what a task says ---------------------------------------------------------------------------------------

    @classmethod
    def fields(cls, data: Any) -> dict[str, Any]:
        """Fields of the model's config that the data decide, unless the user has: {field: its least value}.

        Raises:
            UserError: the data are not for this task.
        """
        raise NotImplementedError

    def prepared(self, batch: Batch, index: int, *, training: bool) -> Batch:
        """The batch that the model sees; `index` counts the batches of this rank since the run (or pass) began."""
        return batch

    def batch_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss of a prepared batch and the number of its scored targets."""
        raise NotImplementedError

    def units(self, batch: Batch) -> int:
        """How many of `unit` a batch holds, fillers included."""
        return batch["tokens"].numel()

    def show(self, model: nn.Module, data: Any, folder: Path, step: int | None = None) -> str | None:
        """Make something of the model to look at.

        Args:
            model: the task's model as it is trained, or the finished one.
            data: the data module.
            folder: where files go, the run's.
            step: updates done; None at the end of the run.

        Returns:
            what to say, and where the file is if there is one; None where the task shows nothing.

        Raises:
            UserError: an extra is not installed.
        """
        return None

    # -- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Add the batch's summed loss to this update."""
        batch = self.prepared(batch, batch_idx, training=True)
        nll, scored = self.batch_loss(batch)
        units = scored.new_full((), self.units(batch))
        n_bytes = batch.get("n_bytes", scored.new_zeros(()))
        self._update += torch.stack([x.float() for x in (nll.detach(), scored, n_bytes, units)])
        # Lightning divides by the number of micro-batches; `configure_gradient_clipping` knows the right divisor.
        return nll * (self.trainer.accumulate_grad_batches / LOSS_UNIT)

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
        totals, units = totals[:3], totals[3]
        self._units += units.long()
        grads = gradients(inner)
        # Data-parallel strategies average over ranks; the mean over tokens wants the sum.
        scale = self.trainer.world_size * LOSS_UNIT / totals[1].clamp(min=1.0)
        norm = _whole(torch.nn.utils.get_total_norm(grads)) * scale
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

    def weights_are_finite(self) -> bool:
        """Whether every weight is a finite number; reads each once and waits for the device once. Same on all ranks.

        A sum is finite only if all its terms are, and costs a tenth of asking each: on one core 0.2 ms for 735,000
        weights, 126 ms for 60 million, 7 % of torch.save's time for them. It may overflow: then each is asked.
        """
        weights = [p.detach() for p in self.model.parameters()]
        total = _whole(torch.stack([weight.sum() for weight in weights]).sum())
        if bool(torch.isfinite(total)):
            return True
        return bool(torch.isfinite(_whole(torch.nn.utils.get_total_norm(weights, norm_type=math.inf))))

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
        metrics: dict[str, Any] = dict(self.val_metrics.items())
        for metric in metrics.values():
            metric.reset()

    # -- what is measured ---------------------------------------------------------------------------------------

    @property
    def columns(self) -> list[str]:
        """The names of all numbers that a row can hold, in order."""
        speed = ["lr", "grad_norm", f"{self.unit}s_per_second", "elapsed", "skipped_steps"]
        train = ["loss", *(m for m in ("bits_per_byte", "perplexity") if m in self.metrics)]
        if self._solvers:
            speed.append("residual")
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
        row = {"val_loss": float(self.val_loss.compute())}
        metrics: dict[str, Any] = dict(self.val_metrics.items())
        return row | {f"val_{name}": float(metric.compute()) for name, metric in metrics.items()}

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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again.

        Raises:
            UserError: the checkpoint is of another model than the run's config describes.
        """
        now, then = describe(self.model), checkpoint[IN_TRAINER]
        if now["model"] != then["model"]:
            raise UserError(
                f"the run cannot go on: its config.yaml says model.name={now['model']} and its checkpoint holds a "
                f"{then['model']}; put the run's own config.yaml back"
            )
        for field, value in now["config"].items():
            if field in then["config"] and then["config"][field] != value:
                raise UserError(
                    f"the run cannot go on: its config.yaml says model.{field}={value} and its checkpoint was trained "
                    f"with {then['config'][field]}; put the run's own config.yaml back, or start a new run"
                )
        state = checkpoint["zoo"]
        self.clock.now = state["elapsed"]
        self._window, self._skipped = state["window"].clone(), state["skipped"].clone()


def _whole(number: Tensor) -> Tensor:
    """A number that was computed from tensors cut across ranks, on every rank."""
    return number.full_tensor() if isinstance(number, DTensor) else number


def summed_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy summed over the scored targets, in float32 or better, and their number."""
    logits = logits.flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss, (targets != IGNORED).sum()


def refuse_classes(task: str, data: Any) -> None:
    """Refuse data that label whole sequences, for a task about tokens."""
    if getattr(data, "n_classes", None) is not None:
        raise UserError(
            f"task={task} is about tokens, and {type(data).__name__} labels whole sequences; use task=classification"
        )
