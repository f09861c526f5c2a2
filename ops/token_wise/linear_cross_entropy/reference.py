"""The definition, with all logits in memory at once."""

import torch
from torch import Tensor


def linear_cross_entropy_reference(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, D), weight (V, D), targets (N,) with -1 where not scored -> the loss of every token, (N,)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(wide) @ weight.to(wide).T
    if bias is not None:
        logits = logits + bias.to(wide)
    chosen = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets < 0, 0.0, logits.logsumexp(dim=1) - chosen)
