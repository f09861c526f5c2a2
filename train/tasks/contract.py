"""What a task says: its losses, its metrics, the unit of its throughput, what there is to show."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from zoo.layers.model import as_model
from zoo.train.metrics import MeanLoss, Metric
from zoo.train.tasks.losses import Loss, LossSums
from zoo.train.tasks.refusals import no_counts

__all__ = ["Batch", "TaskContract"]

Batch = dict[str, Tensor]


class TaskContract(LightningModule):
    """What a task says. Its subclass `Task` trains by it.

    A task gives `losses_of`, which takes the outputs of `forward` and a batch. Where outputs need not exist as a whole,
    `batch_loss` or `losses` stand in its place. It may say by `fields` what the data decide of the model.

    Attributes:
        unit: what its throughput counts, "token", "image", "frame"; see `units`.
        loss_names: of a task of several losses, the names that `losses_of` returns, in order. Their weighted sum is
            trained, and each is logged as "loss_NAME".
        loss_label: what the plot of a run calls the loss.
        metric_classes: what validation is judged by.
        model: what is trained.
        val_loss, val_losses, val_metrics: the sums of a validation.
    """

    unit: str = "token"
    loss_names: tuple[str, ...] = ()
    loss_label: str = "loss (cross entropy, nats per target)"
    metric_classes: tuple[type[Metric], ...] = ()

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.val_loss = MeanLoss()
        self.val_losses = nn.ModuleDict({name: MeanLoss() for name in self.loss_names})
        self.val_metrics = nn.ModuleDict({kind.name: kind() for kind in self.metric_classes})
        self._losses = LossSums(self.loss_names)

    @classmethod
    def fields(cls, data: Any) -> dict[str, Any]:
        """Fields of the model's config that the data decide, unless the user has: {field: its least value}.

        Raises:
            UserError: the data are not for this task.
        """
        return {}

    def prepared(self, batch: Batch, index: int, *, training: bool) -> Batch:
        """The batch that the model sees; `index` counts the batches of this rank since the run (or pass) began."""
        return batch

    def forward(self, batch: Batch) -> Any:
        """The model's outputs for a prepared batch: a tensor, or a named tuple of tensors."""
        return self.model(**as_model(self.model).arguments(batch))[0]

    def losses_of(self, outputs: Any, batch: Batch) -> dict[str, Loss]:
        """The losses of a prepared batch by name, from what `forward` gave for it; any one name where there is one."""
        raise NotImplementedError(f"{type(self).__name__} says its loss by losses_of(outputs, batch)")

    def losses(self, batch: Batch) -> dict[str, Loss]:
        """The losses of a prepared batch, by name.

        Raises:
            UserError: the names are not those of `loss_names`.
        """
        return self.losses_of(self(batch), batch) if self.loss_names else {"loss": Loss(*self.batch_loss(batch))}

    def batch_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of a task of one loss: its sum over a prepared batch, and the number of what it is summed over."""
        (loss,) = self.losses_of(self(batch), batch).values()
        return loss.total, loss.number

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The counts of `losses` of a batch as the data give it, before it is prepared, cut or moved.

        Only tasks of several losses are asked, where several batches make an update.

        Raises:
            UserError: the task does not say.
        """
        raise no_counts(type(self).__name__)

    def units(self, batch: Batch) -> int:
        """How many of `unit` a batch holds, fillers included."""
        return batch["tokens"].numel() if self.unit == "token" else as_model(self.model).units(batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the losses and, by `update(outputs, batch)`, to every metric."""
        batch = self.prepared(batch, batch_idx, training=False)
        outputs = self(batch)
        self.add_losses(self.losses_of(outputs, batch))
        metrics: list[Any] = list(self.val_metrics.values())
        for metric in metrics:
            metric.update(outputs, batch)

    def add_losses(self, losses: Mapping[str, Loss]) -> None:
        """Add a validation batch's losses to their means."""
        if not self.loss_names:
            (loss,) = losses.values()
            self.val_loss.update(loss.total.detach().float(), loss.number)
            return
        means: dict[str, Any] = dict(self.val_losses.items())
        self._losses.weights = tuple(loss.weight for loss in losses.values())
        for name, loss in losses.items():
            means[name].update(loss.total.detach().float(), loss.number)

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
