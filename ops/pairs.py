"""Complex numbers as pairs (..., 2) of real ones: what optimisers, safetensors, collectives and kernels understand."""

import torch
from torch import Tensor


def as_complex(x: Tensor) -> Tensor:
    """(..., 2) real -> (...) complex; a view where the memory allows it."""
    even = all(stride % 2 == 0 for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1)
    return torch.view_as_complex(x if x.stride(-1) == 1 and even and x.storage_offset() % 2 == 0 else x.contiguous())


def as_pairs(z: Tensor) -> Tensor:
    """(...) complex -> (..., 2) real."""
    return torch.view_as_real(z.resolve_conj())
