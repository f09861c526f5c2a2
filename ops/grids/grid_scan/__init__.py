"""The linear recurrence over a grid: each cell sees the one above and the one to its left."""

import itertools

import torch
from torch import Tensor

from zoo.ops import shard
from zoo.ops.core.call import Operator
from zoo.ops.grids.grid_scan.reference import grid_scan_reference
from zoo.ops.grids.grid_scan.wavefront import grid_scan_wavefront

__all__ = ["grid_scan"]


OPERATOR = Operator("grid_scan", cp_kind="frontier", forms=["torch"], no_kernels="its steps are vectors of cells")


@OPERATOR.public()
def grid_scan(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run y[i, j] = a[i, j] * y[i - 1, j] + b[i, j] * y[i, j - 1] + x[i, j] in each channel.

    Args:
        x: input, (B, H, W, D), rows in dimension 1, any float dtype.
        a: what a cell keeps of the one above, (B, H, W, D), in x's dtype. |a| + |b| <= 1 keeps y bounded.
        b: what it keeps of the one to its left, (B, H, W, D), in x's dtype; zeros lie left of the first column.
        state: the row above the first one, (B, W, D); zeros when omitted. With packed pictures (n, W, D).
        cu_seqlens: boundaries (n + 1,) in rows of packed pictures of one width, B = 1; an empty one hands its state
            through.
        backend: "auto" and "torch" (by anti-diagonals, on any device), or "reference".

    Returns:
        y: (B, H, W, D), in the dtype of x.
        last: the last row, (B, W, D) or (n, W, D), float32 (float64 for float64 inputs); feed it back as `state` to go
            on with the rows below.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the backend is unknown or has no form here.

    Cost: 4 B H W D operations in H + W - 1 steps one after the other. The backward keeps a, b and y, and makes three
        copies of them of min(H, W) (H + W - 1) cells. Across ranks rows are cut and one row travels, in micro-batches.
    Source: the two-dimensional linear recurrence of multi-dimensional RNNs (arXiv 0705.2011, without their
        nonlinearity), one channel of 2D SSM (arXiv 2306.06635) and the grid that pLSTM gates (arXiv 2506.11997).
    """
    args = {"x": (x, "B H W D"), "a": (a, "B H W D"), "b": (b, "B H W D")}
    call = OPERATOR.begin(args, alike=("x", "a", "b"), cu_seqlens=cu_seqlens, backend=backend)
    cuts, state = call.cuts, call.state(state, "W D")
    wide = [t.to(call.dtype) for t in (x, a, b)]
    here = shard.current()
    if backend == "reference":
        if here is not None and here.size > 1:
            shard.refuse("grid_scan's loop")
        y, last = _each_picture(wide, state, cuts)
        return y.to(x.dtype), last
    if cuts is None:
        y, last = shard.frontier(_strip, wide, state)
        return y.to(x.dtype), last
    y, last = shard.frontier(_Pictures(cuts), [*wide, state[1:].unsqueeze(0)], state[:1])
    y, others = y.split(
        [call.length, call.documents - 1], dim=1
    )  # the last rows of all pictures but the last one came with the output
    return y.to(x.dtype), torch.cat([others[0], last])


def _each_picture(wide: list[Tensor], state: Tensor, cuts: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """The loop on every picture by itself."""
    x, a, b = wide
    if cuts is None:
        return grid_scan_reference(x, a, b, state) if x.shape[1] else (x, state)
    outputs, lasts = [x[:, :0]], []
    for i, (top, bottom) in enumerate(itertools.pairwise(cuts)):
        last = state[i : i + 1]
        if top < bottom:
            y, last = grid_scan_reference(x[:, top:bottom], a[:, top:bottom], b[:, top:bottom], last)
            outputs.append(y)
        lasts.append(last)
    return torch.cat(outputs, dim=1), torch.cat(lasts)


def _strip(x: Tensor, a: Tensor, b: Tensor, above: Tensor, left: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Some columns of a strip; one without rows stays in the graph of its inputs and of what arrived."""
    y, last, right = grid_scan_wavefront(x, a, b, above, left)
    return y if x.shape[1] else shard.tied(y, x, a, b, above), last, right


class _Pictures:
    """Some columns of a strip with several pictures: the state of the first one comes, that of the last one goes.

    The rows above the others are an input, and their own last rows come with the output.
    """

    def __init__(self, cuts: tuple[int, ...]) -> None:
        self.cuts = cuts

    def __call__(
        self, x: Tensor, a: Tensor, b: Tensor, others: Tensor, above: Tensor, left: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        states = torch.cat([above, others[0]])
        outputs, lasts, rights = [], [], []
        for i, (top, bottom) in enumerate(itertools.pairwise(self.cuts)):
            rows = slice(top, bottom)
            beside = None if left is None else left[:, rows]
            y, last, right = _strip(x[:, rows], a[:, rows], b[:, rows], states[i : i + 1], beside)
            outputs.append(y)
            lasts.append(last)
            rights.append(right)
        return (
            torch.cat([*outputs, *(last.unsqueeze(1) for last in lasts[:-1])], dim=1),
            lasts[-1],
            torch.cat(rights, 1),
        )
