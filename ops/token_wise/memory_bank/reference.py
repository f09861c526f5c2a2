"""The definition of the read from a memory bank, one token at a time."""

import torch
from torch import Tensor


def memory_bank_reference(x: Tensor, bank: Tensor, scale: float) -> Tensor:
    """y_t = sum_i p_i bank_i, p_i in proportion to exp(scale * x_t . bank_i); x (B, T, D), bank (M, D)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    slots, outputs = bank.to(wide), []
    for x_t in x.to(wide).unbind(1):  # (B, D)
        scores = torch.stack([scale * (x_t * slot).sum(-1) for slot in slots], dim=-1)  # (B, M)
        p = (scores - scores.amax(-1, keepdim=True)).exp()
        outputs.append((p / p.sum(-1, keepdim=True)) @ slots)
    return torch.stack(outputs, dim=1).to(x.dtype) if outputs else x
