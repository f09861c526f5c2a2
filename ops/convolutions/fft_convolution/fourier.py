"""Fast torch form: a product of spectra."""

import torch
from torch import Tensor

from zoo.ops.core import documents


def fast_length(n: int) -> int:
    """The smallest even number of at least n without a prime factor above 5: transforms of it are fast."""
    best = 2
    while best < n:
        best *= 2
    for fives in (1, 5, 25):
        for threes in (1, 3, 9):
            length = 2 * fives * threes
            while length < n:
                length *= 2
            best = min(best, length)
    return best


def convolve(u: Tensor, k: Tensor) -> Tensor:
    """The causal convolution of u (B, T, D) with k (D, L), in their dtype, float32 or float64."""
    T = u.shape[1]
    k = k[:, :T]
    n = fast_length(T + k.shape[1] - 1)  # long enough that nothing wraps around
    spectrum = torch.fft.rfft(u, n, dim=1) * torch.fft.rfft(k, n).T
    y: Tensor = torch.fft.irfft(spectrum, n, dim=1)[:, :T]
    return y


def fft_convolution_fourier(
    u: Tensor, k: Tensor, D: Tensor | None, cuts: tuple[int, ...] | None, dtype: torch.dtype
) -> Tensor:
    """The convolution of a batch, or of every packed document."""
    wide, taps = u.to(dtype), k.to(dtype)
    if cuts is None:
        y = convolve(wide, taps)
    else:
        groups = documents.groups(cuts, u.device)
        y = documents.scatter([convolve(documents.gather(wide, g), taps) for g in groups], groups, u.shape[1])
    return (y if D is None else torch.addcmul(y, D.to(dtype), wide)).to(u.dtype)
