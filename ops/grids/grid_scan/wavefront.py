"""The torch form of the scan over a grid: all cells of an anti-diagonal at once.

Cells (i, j) with one i + j = d know nothing of each other, so that a grid takes H + W - 1 steps. Rows are skewed, row i
by i places, which puts an anti-diagonal into one slab:

    0 1 2 3         0 1 2 3 . .
    1 2 3 4   ->    . 1 2 3 4 .      numbers are d = i + j, columns are slabs
    2 3 4 5         . . 2 3 4 5

Gradients run the same recurrence from the last cell to the first: with g the whole gradient of y,
g[i, j] = dy[i, j] + a[i + 1, j] g[i + 1, j] + b[i, j + 1] g[i, j + 1]; then dx = g, da[i, j] = g[i, j] y[i - 1, j] and
db[i, j] = g[i, j] y[i, j - 1].
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.core.autograd import apply


def grid_scan_wavefront(
    x: Tensor, a: Tensor, b: Tensor, above: Tensor, left: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x, a, b (B, H, W, D), the row above (B, W, D), the column to the left (B, H, D) -> y, its last row and column."""
    if not x.shape[1] * x.shape[2]:
        return x, above, x.sum(2)
    x = torch.cat([x[:, :1] + a[:, :1] * above.unsqueeze(1), x[:, 1:]], dim=1)
    if left is not None:
        x = torch.cat([x[:, :, :1] + b[:, :, :1] * left.unsqueeze(2), x[:, :, 1:]], dim=2)
    y: Tensor = apply(_Wavefront, x, a, b)
    return y, y[:, -1], y[:, :, -1]


class _Wavefront(torch.autograd.Function):
    """The scan with zeros above and to the left. Its backward is differentiable, for it is made of itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = _sweep(x, a, b)
        ctx.save_for_backward(a, b, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        a, b, y = ctx.saved_tensors
        g = apply(_Wavefront, _turned(dy), _turned(_shift(a, 1, -1)), _turned(_shift(b, 2, -1)))
        g = _turned(g)
        da = g * _shift(y, 1, 1) if ctx.needs_input_grad[1] else None
        db = g * _shift(y, 2, 1) if ctx.needs_input_grad[2] else None
        return g, da, db


def _turned(x: Tensor) -> Tensor:
    return x.flip(1, 2)


def _shift(x: Tensor, dim: int, by: int) -> Tensor:
    """x a place further or back along a dimension; zeros come in."""
    kept, zeros = x.narrow(dim, max(0, -by), x.shape[dim] - 1), torch.zeros_like(x.narrow(dim, 0, 1))
    return torch.cat([zeros, kept] if by > 0 else [kept, zeros], dim=dim)


def _sweep(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Anti-diagonal after anti-diagonal; the shorter side of the grid lies in the slabs."""
    H, W = x.shape[1:3]
    if H > W:
        return _sweep(x.transpose(1, 2), b.transpose(1, 2), a.transpose(1, 2)).transpose(1, 2)
    X, A, B = _skewed(x), _skewed(a), _skewed(b)
    Y = X.new_zeros(H + W, X.shape[1], H + 1, X.shape[3])  # a slab and a row of zeros before the first one
    for d in range(H + W - 1):
        first, end = max(0, d - W + 1), min(H, d + 1)  # rows that have a cell on this anti-diagonal
        cells, before = Y[d + 1, :, first + 1 : end + 1], Y[d]
        torch.addcmul(X[d, :, first:end], B[d, :, first:end], before[:, first + 1 : end + 1], out=cells)
        cells.addcmul_(A[d, :, first:end], before[:, first:end])
    return _straight(Y[1:, :, 1:], W)


def _skewed(x: Tensor) -> Tensor:
    """(B, H, W, D) -> (H + W - 1, B, H, D): slab d holds the cells with i + j = d, zeros where a row has none."""
    H, W = x.shape[1:3]
    lines = F.pad(x, (0, 0, 0, H)).flatten(1, 2)[:, : H * (H + W - 1)]  # a row longer than the view: each slips by one
    slabs: Tensor = lines.unflatten(1, (H, H + W - 1)).permute(2, 0, 1, 3).contiguous()
    return slabs


def _straight(y: Tensor, W: int) -> Tensor:
    """The other way, (H + W - 1, B, H, D) -> (B, H, W, D)."""
    H = y.shape[2]
    lines = F.pad(y.permute(1, 2, 0, 3).flatten(1, 2), (0, 0, 0, H))
    rows: Tensor = lines.unflatten(1, (H, H + W))[:, :, :W].contiguous()
    return rows
