"""What the most likely token gets right, counted so that batches of any shape and any rank add up."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops import shard
from zoo.ops.shard.exchange import all_gather

__all__ = ["IGNORED", "Right", "count_right"]

IGNORED = -100  # the target of a position that is not scored


class Right(NamedTuple):
    """What the most likely token gets right; a sequence without a scored position does not count."""

    positions: Tensor
    scored: Tensor  # positions
    sequences: Tensor  # with every scored position right
    of_sequences: Tensor
    last: Tensor  # sequences whose last scored position is right


def count_right(logits: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> Right:
    """How many positions and how many whole sequences the most likely token gets right.

    Args:
        logits: (B, T, vocab).
        targets: (B, T), -100 where not scored. Under a sequence shard both are a rank's stretch, and a sequence is
            counted once, on the first rank of the group.
        cu_seqlens: (n + 1,) for packed documents (then B = 1), else None: every row is a sequence.
    """
    scored = targets != IGNORED
    wrong = (logits.argmax(dim=-1) != targets) & scored
    place = shard.current()
    tokens = targets.shape[1]
    at = torch.arange(tokens, device=targets.device)
    if place is not None:
        at = shard.tokens_of(place, tokens).to(targets.device)
    # The largest is that of the last scored position, and its lowest bit says whether that one is right.
    last = torch.where(scored, 2 * at + (~wrong).long(), -1)
    if cu_seqlens is None:
        # a rank may hold no token: the column in front stands for that
        last, has_wrong = F.pad(last, (1, 0), value=-1).amax(dim=1), wrong.any(dim=1).long()
    else:
        bounds = cu_seqlens.long()
        if place is not None:
            bounds = torch.tensor(place.documents, device=targets.device)
        owner = torch.searchsorted(bounds[1:].contiguous(), at, right=True)
        zeros = torch.zeros(len(bounds) - 1, dtype=torch.int64, device=targets.device)
        last = (zeros - 1).scatter_reduce(0, owner, last[0], "amax")
        has_wrong = zeros.scatter_reduce(0, owner, wrong[0].long(), "amax")
    if place is not None:
        last, has_wrong = torch.stack(all_gather(place, torch.stack([last, has_wrong]))).amax(0)
        if place.rank > 0:
            last, has_wrong = torch.full_like(last, -1), torch.zeros_like(has_wrong)
    n_scored, n_sequences = scored.sum(), (last >= 0).sum()
    return Right(
        positions=n_scored - wrong.sum(),
        scored=n_scored,
        sequences=n_sequences - has_wrong.sum(),
        of_sequences=n_sequences,
        last=((last >= 0) & (last % 2 == 1)).sum(),
    )
