"""Losses that are means over a count: what a task returns, and the sums of tasks that have several."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.errors import UserError
from zoo.ops import shard
from zoo.ops.shard.exchange import all_gather
from zoo.train.metrics import IGNORED

__all__ = ["Loss", "LossSums", "sequence_means", "summed_loss"]


class Loss(NamedTuple):
    """One loss of a batch: a mean that is still a sum and its number, so that batches and ranks add up.

    total: the sum over what is counted, a scalar with a gradient.
    number: how many there are, a scalar of integers; sequences where each has a mean of its own.
    weight: its part in what is trained.
    """

    total: Tensor
    number: Tensor
    weight: float = 1.0


def sequence_means(values: Tensor, there: Tensor | None = None, *, weight: float = 1.0) -> Loss:
    """The sum over sequences of the mean over their positions, and the number of sequences.

    Args:
        values: (B, T), one number a position. Under a sequence shard it is a rank's stretch, and the sequences are
            counted on the first rank of the group.
        there: (B, T) bool, False where there is no position; what `values` holds there does not matter. A sequence
            without any position does not count.
        weight: the loss's part in what is trained.
    """
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    there = torch.ones_like(values, dtype=torch.bool) if there is None else there
    lengths = there.sum(dim=1)
    place = shard.current()
    if place is not None:
        lengths = torch.stack(all_gather(place, lengths)).sum(0)
    total = (torch.where(there, wide, 0.0) / lengths.clamp(min=1)[:, None]).sum()
    count = (lengths > 0).sum()
    return Loss(total, count if place is None or place.rank == 0 else torch.zeros_like(count), weight)


def summed_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy summed over the scored targets, in float32 or better, and their number."""
    logits = logits.flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss, (targets != IGNORED).sum()


class LossSums:
    """The sums of several losses since the last row, and of the update under way; nothing here waits for the device.

    Args:
        names: of the losses, in the order of the columns. There may be none.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.weights: tuple[float, ...] = (1.0,) * len(names)
        self.update = torch.zeros(len(names), 2)  # this update's [total, count] on this rank
        self.window = torch.zeros(len(names), 2)  # since the last row, on all ranks
        self.ahead: Tensor | None = None  # (K,) int64, the counts of the update under way on all ranks
        self.miscounted = torch.zeros((), dtype=torch.bool)  # an update counted something else

    def to(self, device: torch.device) -> None:
        """Move all sums to the device of the run."""
        self.update, self.window = self.update.to(device), self.window.to(device)
        self.miscounted = self.miscounted.to(device)

    def add(self, losses: Mapping[str, Loss]) -> tuple[Tensor, Tensor]:
        """Take a batch's losses in.

        Returns:
            totals (K,) in float32 or better, with gradients, and counts (K,) int64.

        Raises:
            UserError: the names are others than the task's.
        """
        if tuple(losses) != self.names:
            raise UserError(
                f"a task returns the losses that its loss_names name, {', '.join(self.names)}; got {', '.join(losses)}"
            )
        given = losses.values()
        self.weights = tuple(loss.weight for loss in given)
        totals = torch.stack([loss.total.to(torch.promote_types(loss.total.dtype, torch.float32)) for loss in given])
        counts = torch.stack([loss.number.long() for loss in given])
        self.update += torch.stack([totals.detach(), counts], dim=1).float()
        return totals, counts

    def counted(self, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """The counts (K,) of several batches together."""
        return torch.stack([sum((counts[name].long() for counts in batches), torch.tensor(0)) for name in self.names])

    def weighted(self, totals: Tensor, counts: Tensor) -> Tensor:
        """The sum of the losses' parts in what is trained; a loss that counts nothing anywhere is 0."""
        return (totals.new_tensor(self.weights) * totals / counts.clamp(min=1)).sum()

    def close(self, update: Tensor, bad: Tensor) -> None:
        """End an update whose sums on all ranks are `update`; one that is skipped does not count."""
        if self.ahead is not None:
            self.miscounted |= (update[:, 1] != self.ahead).any()
            self.ahead = None
        self.window += torch.where(bad, torch.zeros_like(update), update)
        self.update.zero_()

    def refuse_miscounted(self) -> None:
        """Refuse a task whose counts ahead were not those of its losses: its updates were no means.

        Raises:
            UserError: an update counted something else.
        """
        if bool(self.miscounted):
            raise UserError(
                "counts(batch) of a task must give the counts of its losses(batch), and an update counted something "
                "else; mend the one or the other"
            )

    def row(self) -> dict[str, float]:
        """{loss: the weighted sum, loss_NAME: the mean of each} since the last call; reads the device."""
        means = [total / count if count else math.nan for total, count in self.window.tolist()]
        self.window.zero_()
        return weighted_row(dict(zip(self.names, means, strict=True)), self.weights)


def weighted_row(means: Mapping[str, float], weights: tuple[float, ...]) -> dict[str, float]:
    """{loss: the weighted sum, loss_NAME: the mean of each}; a loss that counted nothing has no part in the sum."""
    parts = [weight * mean for weight, mean in zip(weights, means.values(), strict=True) if not math.isnan(mean)]
    return {"loss": sum(parts) if parts else math.nan, **{f"loss_{name}": mean for name, mean in means.items()}}
