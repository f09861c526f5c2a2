"""Scalar decays inside a chunk for Triton kernels: what `zoo.ops.core.decay` is for the torch forms.

Running sums are kept in float64, one number a token, so that their differences are exact behind a gate that shuts: of
64 steps of at least SMALLEST_LOG they are good to 1e-10, where float32 sums of the same gates would be good to 0.03.
"""

import triton
import triton.language as tl

from zoo.ops.core import decay

SMALLEST_LOG: tl.constexpr = tl.constexpr(decay.SMALLEST_LOG)


@triton.jit
def log_sums(b_g):
    """Running sums (C,) in float64 of the log decays of a chunk."""
    return tl.cumsum(tl.minimum(tl.maximum(b_g, SMALLEST_LOG), 0.0).to(tl.float64), 0)


@triton.jit
def end_of(b_l, o_t, CHUNK: tl.constexpr):
    """The running sum at the chunk's end."""
    return tl.sum(tl.where(o_t == CHUNK - 1, b_l, 0.0), 0)


@triton.jit
def between(b_l, o_t, TRANSPOSED: tl.constexpr):
    """exp(l_i - l_j) for i >= j, else 0, rows i and columns j, or transposed; masked before the exponential."""
    b_high = b_l.to(tl.float32)
    b_low = (b_l - b_high).to(tl.float32)  # the difference of two halves has the error of the difference alone
    b_d = (b_high[:, None] - b_high[None, :]) + (b_low[:, None] - b_low[None, :])
    if TRANSPOSED:
        return tl.exp(tl.where(o_t[:, None] <= o_t[None, :], -b_d, float("-inf")))
    else:
        return tl.exp(tl.where(o_t[:, None] >= o_t[None, :], b_d, float("-inf")))


@triton.jit
def across(b_pairs, o_t):
    """Sums over all i >= t > j of (C, C), for every t, as `zoo.ops.core.decay.across`: never a difference."""
    b_pairs = tl.cumsum(tl.where(o_t[:, None] > o_t[None, :], b_pairs, 0.0), 0, reverse=True)  # over i >= t
    return tl.sum(tl.where(o_t[:, None] > o_t[None, :], b_pairs, 0.0), 1)  # over j < t
