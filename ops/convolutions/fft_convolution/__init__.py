"""Causal convolution with taps as long as the sequence."""

import itertools

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.convolutions.fft_convolution.fourier import fft_convolution_fourier
from zoo.ops.convolutions.fft_convolution.reference import fft_convolution_reference
from zoo.ops.core.call import Operator

__all__ = ["fft_convolution"]


OPERATOR = Operator(
    "fft_convolution",
    cp_kind="local",  # one rank's stretch cannot be convolved without its past: refused
    forms=["torch"],
    no_kernels="the transform is the device's library",
)


@OPERATOR.public()
def fft_convolution(
    u: Tensor,
    k: Tensor,
    D: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Convolve each channel with its own long taps: y_t = sum_l k[:, l] * u_{t-l} + D * u_t.

    It has no state, since the past of a long convolution is the whole past: a kernel that comes from a state space has
    one, and `zoo.ops.s4d` and `zoo.ops.s4` hand it on. For short taps `causal_conv1d` is faster.

    Args:
        u: input, (B, T, D), any float dtype.
        k: taps, (D, L), the first one is the present token; those beyond T are not used. Of the dtype of u.
        D: skip, (D,), or None.
        cu_seqlens: boundaries (n + 1,) of packed documents, B = 1: each is convolved alone.
        backend: "auto" and "torch" (by Fourier transform on any device), or "reference".

    Returns:
        y: (B, T, D), in the dtype of u.

    Raises:
        ValueError: shapes, dtypes or devices disagree, the backend is unknown or has no form here, or time is cut
            across ranks.

    Cost: O(B T D log T) operations and three spectra of float32 (float64 for float64 inputs). Packed documents are
        padded to groups of like length: at most log2(T) groups, less than twice the work.
    Source: arXiv 2111.00396, section 2.4.
    """
    args = {"u": (u, "B T D"), "k": (k, "D L"), "D": (D, "D")}
    call = OPERATOR.begin(args, alike=("u", "k", "D"), cu_seqlens=cu_seqlens, backend=backend)
    shard.refuse("fft_convolution, which has no state,")
    if not u.numel() or not k.numel():
        return torch.zeros_like(u) if D is None else u * D
    if call.backend != "reference":
        return fft_convolution_fourier(u, k, D, call.cuts, call.dtype)
    bounds = itertools.pairwise(call.cuts or (0, u.shape[1]))
    pieces = [fft_convolution_reference(u[:, a:b], k, D, call.dtype) for a, b in bounds if a < b]
    return torch.cat(pieces, dim=1)
