"""What the kernels of Newton's method share: gates, shifts along time, and the scans of a window."""

import triton
import triton.language as tl

WINDOW = 64  # steps that are solved at once; not tuned on a device yet
BLOCK_D = 16  # channels of a program at most
WARPS = 4
ENOUGH = 3e-3  # as the torch form's in float32
LIMIT = 16  # corrections of a window before it is walked


def block_of(D: int) -> int:
    """Channels of a program: two blocks at least, so that small widths prove the borders between blocks, too."""
    return min(BLOCK_D, triton.next_power_of_2(triton.cdiv(D, 2)))


@triton.jit
def tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)


@triton.jit
def later(x, first, WINDOW: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows one step later: row t is x's row t - 1, row 0 is `first`."""
    o_t = tl.arange(0, WINDOW)[:, None] + tl.zeros([1, BLOCK_D], dtype=tl.int32)
    return tl.where(o_t == 0, first[None, :], tl.gather(x, tl.maximum(o_t - 1, 0), 0))


@triton.jit
def earlier(x, last, WINDOW: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows one step earlier: row t is x's row t + 1, the last row is `last`."""
    o_t = tl.arange(0, WINDOW)[:, None] + tl.zeros([1, BLOCK_D], dtype=tl.int32)
    return tl.where(o_t == WINDOW - 1, last[None, :], tl.gather(x, tl.minimum(o_t + 1, WINDOW - 1), 0))


@triton.jit
def row(x, t, WINDOW: tl.constexpr):
    """Row t of a tile."""
    return tl.sum(tl.where((tl.arange(0, WINDOW) == t)[:, None], x, 0.0), 0)


@triton.jit
def size_of(d):
    """The largest |d|; infinity where one is not a number."""
    return tl.max(tl.max(tl.where(d == d, tl.abs(d), float("inf")), 1), 0)


@triton.jit
def then(a1, b1, a2, b2):
    """h -> a1 h + b1, then h -> a2 h + b2."""
    return a2 * a1, a2 * b1 + b2


@triton.jit
def then_blocks(p00, p01, p10, p11, g0, g1, a00, a01, a10, a11, b0, b1):
    """The same with 2x2 blocks."""
    return (
        a00 * p00 + a01 * p10,
        a00 * p01 + a01 * p11,
        a10 * p00 + a11 * p10,
        a10 * p01 + a11 * p11,
        a00 * g0 + a01 * g1 + b0,
        a10 * g0 + a11 * g1 + b1,
    )
