"""The losses of a task in the bare loop: of a task that says them by `losses_of`, in this tree."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

try:
    from zoo.train.optim import Limits
    from zoo.train.tasks.contract import TaskContract
except (ImportError, ModuleNotFoundError):  # this code measures older commits, too
    TaskContract = None  # type: ignore[assignment, misc]

__all__ = ["make_task", "mean_loss", "own_losses", "says_losses"]


def says_losses(kind: Any) -> bool:
    """Whether a class of tasks says its losses from a model's outputs, on batches as the data give them."""
    if TaskContract is None:
        return False
    return kind.losses_of is not TaskContract.losses_of and kind.prepared is TaskContract.prepared


def make_task(kind: Any, settings: Mapping[str, Any], model: nn.Module, optim: Any, data: Any) -> Any:
    """The task of a model, outside of any run; None in a tree from before tasks said what they are."""
    return None if TaskContract is None else kind(model, optim, Limits(), data, **settings)


def mean_loss(losses: Mapping[str, Any]) -> Tensor:
    """The weighted sum of losses, each over its own number."""
    means = [loss.weight * loss.total / loss.number.clamp(min=1) for loss in losses.values()]
    return torch.stack(means).sum()


def own_losses(task: Any, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of a task that says its losses, in float32 at least."""
    loss = mean_loss(task.losses_of(outputs, batch))
    return loss.to(torch.promote_types(loss.dtype, torch.float32))
