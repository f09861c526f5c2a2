"""Complex numbers as pairs (..., 2) of real ones: what optimisers, safetensors, collectives and kernels understand."""

import torch
from torch import Tensor


def as_complex(x: Tensor) -> Tensor:
    """(..., 2) real -> (...) complex; a view where x is contiguous."""
    return torch.view_as_complex(x.contiguous())


def as_pairs(z: Tensor) -> Tensor:
    """(...) complex -> (..., 2) real."""
    return torch.view_as_real(z.resolve_conj())
