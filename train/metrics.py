"""Metrics of language modelling: sums over scored targets, so that batches of any shape and any rank add up."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.ops import shard
from zoo.ops.shard.exchange import all_gather

__all__ = ["Accuracy", "BitsPerByte", "MeanLoss", "Perplexity", "SequenceAccuracy"]

IGNORED = -100  # the target of a position that is not scored


class _Ratio(Metric):
    """A sum over a count, both added up over batches and ranks."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor) -> None:
        """Add one batch."""
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        """The ratio so far."""
        return self.total / self.count


class MeanLoss(_Ratio):
    """Nats per scored target. `update(nll, n_scored)`, both sums over the batch."""


class Perplexity(_Ratio):
    """exp of the nats per scored target. `update(nll, n_scored)`."""

    def compute(self) -> Tensor:
        """exp(nll / n_scored)."""
        return (self.total / self.count).exp()


class BitsPerByte(_Ratio):
    """Bits per byte of the text behind the scored targets. `update(nll, n_bytes)`."""

    def compute(self) -> Tensor:
        """nll / (ln 2 * n_bytes): comparable between tokenizers."""
        return self.total / (math.log(2) * self.count)


class Accuracy(_Ratio):
    """The part of the scored positions whose most likely token is the target. `update(n_right, n_scored)`."""


class SequenceAccuracy(_Ratio):
    """The part of the sequences with every scored position right. `update(n_right, n_sequences)`."""


def count_right(logits: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How many positions and how many whole sequences the most likely token gets right.

    Args:
        logits: (B, T, vocab).
        targets: (B, T), -100 where not scored. Under a sequence shard both are a rank's stretch, and a sequence is
            counted once, on the first rank of the group.
        cu_seqlens: (n + 1,) for packed documents (then B = 1), else None: every row is a sequence.

    Returns:
        right and scored positions, right and scored sequences; a sequence without a scored position does not count.
    """
    scored = targets != IGNORED
    wrong = (logits.argmax(dim=-1) != targets) & scored
    place = shard.current()
    if cu_seqlens is None:
        has_scored, has_wrong = scored.any(dim=1), wrong.any(dim=1)
    else:
        bounds, at = cu_seqlens.long(), torch.arange(targets.shape[1], device=targets.device)
        if place is not None:
            bounds = torch.tensor(place.documents, device=targets.device)
            length = int(bounds[-1])
            at = shard.held(length, place.rank, place.size, place.layout or "contiguous").to(targets.device)
        owner = torch.searchsorted(bounds[1:].contiguous(), at, right=True)
        zeros = torch.zeros(len(bounds) - 1, dtype=torch.int64, device=targets.device)
        has_scored = zeros.index_add(0, owner, scored[0].long()) > 0
        has_wrong = zeros.index_add(0, owner, wrong[0].long()) > 0
    if place is not None:
        has_scored, has_wrong = (
            torch.stack(all_gather(place, torch.stack([has_scored, has_wrong]).long())).amax(0).bool()
        )
        if place.rank > 0:
            has_scored, has_wrong = torch.zeros_like(has_scored), torch.zeros_like(has_wrong)
    n_scored, n_sequences = scored.sum(), has_scored.sum()
    return n_scored - wrong.sum(), n_scored, n_sequences - has_wrong.sum(), n_sequences
