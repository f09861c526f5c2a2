"""What the kernels of Newton's method share: gates, shifts along time, and the scans of a window."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from zoo.ops.core.kernel_case import KernelCase

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
    """The hyperbolic tangent by one exponential of a negative number, which cannot overflow."""
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


def offsets_of(batch: int, length: int, cuts: tuple[int, ...] | None, device: torch.device) -> torch.Tensor:
    """Where sequences begin and end in the flattened stream, (N + 1,) int64: those of a batch, or packed documents."""
    bounds = [i * length for i in range(batch + 1)] if cuts is None else cuts
    return torch.tensor(bounds, dtype=torch.int64, device=device)


def cases(kernels: tuple[Any, ...], types: Mapping[str, str], *, spills: int = 0) -> list[KernelCase]:
    """Every kernel in bfloat16 and float32, with and without resets; widths are run-time arguments."""
    made = []
    for dtype in ("bf16", "fp32"):
        for has_keep in (False, True):
            known = {"u_ptr": f"*{dtype}", "du_ptr": f"*{dtype}", "offsets_ptr": "*i64", "D": "i32", **types}
            constants = {"ENOUGH": ENOUGH, "LIMIT": LIMIT, "WINDOW": WINDOW, "BLOCK_D": BLOCK_D, "HAS_KEEP": has_keep}
            for kernel in kernels:
                own = {x: y for x, y in constants.items() if x in kernel.arg_names}
                signature = {x: known.get(x, "*fp32") for x in kernel.arg_names if x not in own}
                label = f"{dtype}{', resets' if has_keep else ''}"
                made.append(KernelCase(kernel, signature, own, num_warps=WARPS, spills=spills, label=label))
    return made
