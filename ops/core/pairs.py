"""Complex numbers as pairs (..., 2) of real ones: what optimisers, safetensors, collectives and kernels understand."""

import torch
from torch import Tensor


def as_complex(x: Tensor) -> Tensor:
    """(..., 2) real -> (...) complex; a view where x is contiguous and its pairs lie at even places of the storage."""
    if torch.compiler.is_compiling():  # which cannot ask where in its storage a tensor begins
        return torch.complex(x[..., 0], x[..., 1])
    x = x.contiguous()
    if x.storage_offset() % 2 or any(stride % 2 for stride in x.stride()[:-1]):  # strides: of dimensions of size 1
        x = x.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(x)


def as_pairs(z: Tensor) -> Tensor:
    """(...) complex -> (..., 2) real."""
    return torch.view_as_real(z.resolve_conj())
