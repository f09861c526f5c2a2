"""The definition of the SwiGLU's product."""

import torch
from torch import Tensor


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up, in float32 at least."""
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return (wide * torch.sigmoid(wide) * up).to(gate.dtype)
