"""The loss of a head for tokens: without its logits where the head is a plain linear layer, else by calling it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from zoo.ops import linear_cross_entropy, shard
from zoo.ops.core import dispatch

__all__ = ["head_loss"]


def head_loss(
    head: nn.Module,
    x: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
    plain: bool = True,
) -> Tensor:
    """Cross entropy of `head(x)`, in float32 at least.

    Adapters (LoRA) and parametrizations take the place of a linear layer and must be called: its matrix alone is not
    what it computes.

    Args:
        head: (B, T, D) -> (B, T, V).
        x: hidden vectors, (B, T, D).
        targets: (B, T) integers in [0, V), or ignore_index where a token is not scored.
        ignore_index: see there.
        reduction: "mean" over the scored tokens, "sum" or "none", (B, T).
        backend: of zoo.ops.linear_cross_entropy.
        plain: the head was built as a linear layer. It is said once when it is one no longer.
    """
    if type(head) is nn.Linear and not is_parametrized(head):
        return linear_cross_entropy(
            x, head.weight, targets, bias=head.bias, ignore_index=ignore_index, reduction=reduction, backend=backend
        )
    if plain:
        dispatch.say_once(
            f"the head is a {type(head).__name__} in place of a plain linear layer, so it is called as a whole and the "
            "logits of a batch are held in memory"
        )
    if reduction == "mean" and shard.current() is not None:
        raise ValueError(
            "head_loss: reduction 'mean' would be that of one rank's slice of the sequence; use 'sum' and divide by "
            "the number of scored targets of all ranks"
        )
    logits = head(x)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    losses = F.cross_entropy(logits, targets.flatten().long(), ignore_index=ignore_index, reduction=reduction)
    return losses.view(targets.shape) if reduction == "none" else losses
