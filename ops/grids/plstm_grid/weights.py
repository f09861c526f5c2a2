"""What every cell and every edge into a tile means to every cell and edge out of it: sums over paths of products.

A tile has r x c cells, c edges that enter from above and r from the left, as many that leave below and to the right.
The scalar recurrence runs once for all of these sources side by side, one anti-diagonal of cells after the other:

                top edges                       out[o] = S_o [source is this cell] + A_{o,0} above + A_{o,1} left
                | | | |                         o = 0: the edge down, 1: the edge to the right, 2: what the cell reads
      left    - + + + + -   right edges
      edges   - + + + + -
                | | | |
              bottom edges

Cells lie in one line with a border above and to the left, row after row of c + 1. There an anti-diagonal is a slice
with the step c, and so are its neighbours above and to the left: nothing is gathered.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from zoo.ops.core.autograd import apply
from zoo.ops.core.differentiation import first_order

# CPU time of forward + backward, float32, N=1024 tiles of 8 x 8, one core of a busy machine: 2**18 / 2**20 / 2**23 take
# 396 / 257 / 567 ms. Below, calls dominate, and above, what does not fit into a cache.
SEGMENT = 2**20  # numbers that are worked on at a time


def tile_weights(A: Tensor, S: Tensor, *, edges: bool = True) -> Tensor:
    """All paths through tiles.

    Args:
        A: (N, r, c, 3, 2), what down, right and the read take of the edges from above and from the left.
        S: (N, r, c, 3), what they take of the cell itself.
        edges: False for the first r c rows and columns alone, of a tile that nothing enters or leaves.

    Returns:
        (N, r c + c + r, r c + c + r). Rows: what cells read, edges below, edges to the right. Columns: cells, edges
        from above, edges from the left.

    Cost: 6 multiplications for every cell and source, in r + c - 1 steps; done once more in the backward.
    """
    made: Tensor = apply(_Weights, A, S, edges)
    return made


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, S: Tensor, edges: bool) -> Tensor:
        ctx.save_for_backward(A, S)
        ctx.edges = edges
        r, c = A.shape[1:3]
        sources = r * c + (c + r if edges else 0)
        G = A.new_empty(len(A), sources, sources)
        room = A.new_empty(0)
        for part in _parts(A):
            room, U = _zeros(room, A[part], sources)
            _run(A[part], S[part], U)
            for rows, values in zip(_sinks(G[part], r, c), _ends(U, r, c), strict=False):
                rows.copy_(values)
        return G

    @staticmethod
    @first_order("plstm_grid")
    def backward(ctx: Any, dG: Tensor) -> tuple[Tensor, Tensor, None]:
        A, S = ctx.saved_tensors
        r, c = A.shape[1:3]
        dA, dS = torch.empty_like(A), torch.empty_like(S)
        room, droom = A.new_empty(0), A.new_empty(0)
        for part in _parts(A):
            room, U = _zeros(room, A[part], dG.shape[-1])
            _run(A[part], S[part], U)
            droom, dU = _zeros(droom, A[part], dG.shape[-1])
            for rows, values in zip(_sinks(dG[part], r, c), _ends(dU, r, c), strict=False):
                values.copy_(rows)
            dA[part], dS[part] = _back(A[part], U, dU)
        return dA, dS, None


def _parts(A: Tensor) -> Iterator[slice]:
    """Slices of the tiles that are worked on together."""
    r, c = A.shape[1:3]
    size = max(1, SEGMENT // ((r + 1) * (c + 1) * 3 * (r * c + r + c)))
    return (slice(i, i + size) for i in range(0, len(A), size))


def _zeros(room: Tensor, A: Tensor, sources: int) -> tuple[Tensor, Tensor]:
    """The same memory for every part, and zeros ((r + 1)(c + 1), 3, N, s) in it."""
    N, r, c = A.shape[:3]
    shape = (r + 1) * (c + 1), 3, N, sources
    numbers = math.prod(shape)
    room = room if room.numel() >= numbers else A.new_empty(numbers)
    return room, room[:numbers].zero_().view(shape)


def _ends(U: Tensor, r: int, c: int) -> tuple[Tensor, Tensor, Tensor]:
    """What cells read (r, c, N, s), the edges below (c, N, s) and those to the right (r, N, s): views."""
    grid = U.unflatten(0, (r + 1, c + 1))
    return grid[1:, 1:, 2], grid[-1, 1:, 0], grid[1:, -1, 1]


def _sinks(G: Tensor, r: int, c: int) -> tuple[Tensor, ...]:
    """The same as views of weights (N, sinks, s); the first alone where there are no edges."""
    rows, n = G.transpose(0, 1), r * c
    read = rows[:n].unflatten(0, (r, c))
    return (read, *rows[n:].split([c, r])) if len(rows) > n else (read,)


def _diagonals(r: int, c: int) -> Iterator[tuple[slice, slice, slice]]:
    """Of every anti-diagonal: its cells, and those above and to the left of them, in a line of (r + 1)(c + 1)."""
    for d in range(r + c - 1):
        low, high = max(0, d - c + 1), min(d, r - 1)
        start, stop = (low + 1) * (c + 1) + d - low + 1, (high + 1) * (c + 1) + d - high + 2
        yield slice(start, stop, c), slice(start - c - 1, stop - c - 1, c), slice(start - 1, stop - 1, c)


def _places(r: int, c: int, device: torch.device) -> Tensor:
    """Where the cells, row by row, lie in the line with a border."""
    line = torch.arange((r + 1) * (c + 1), device=device).view(r + 1, c + 1)
    return line[1:, 1:].flatten()


def _bordered(A: Tensor) -> Tensor:
    """(N, r, c, 3, 2) -> ((r + 1)(c + 1), 3, 2, N, 1)."""
    N, r, c = A.shape[:3]
    line = A.new_zeros(r + 1, c + 1, 3, 2, N)
    line[1:, 1:] = A.movedim(0, -1)
    return line.flatten(0, 1).unsqueeze(-1)


def _run(A: Tensor, S: Tensor, U: Tensor) -> None:
    """The recurrence for all sources, from zeros in U ((r + 1)(c + 1), 3, N, s)."""
    r, c = A.shape[1:3]
    n, line = r * c, _bordered(A)
    grid, cells = U.unflatten(0, (r + 1, c + 1)), torch.arange(n, device=A.device)
    U[_places(r, c, A.device), :, :, cells] = S.flatten(1, 2).permute(1, 2, 0)
    if U.shape[-1] > n:
        grid[0, 1:, 0, :, n : n + c].diagonal(dim1=0, dim2=2).fill_(1)
        grid[1:, 0, 1, :, n + c :].diagonal(dim1=0, dim2=2).fill_(1)
    for here, above, left in _diagonals(r, c):
        out = U[here]
        out.addcmul_(line[here, :, 0], U[above, :1])
        out.addcmul_(line[here, :, 1], U[left, 1:2])


def _back(A: Tensor, U: Tensor, dU: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of A and S from those of all values, which are changed in place."""
    r, c = A.shape[1:3]
    line = _bordered(A)
    dline = torch.zeros_like(line[..., 0])
    for here, above, left in reversed(list(_diagonals(r, c))):
        dout = dU[here]
        dline[here, :, 0], dline[here, :, 1] = (dout * U[above, :1]).sum(-1), (dout * U[left, 1:2]).sum(-1)
        dU[above, 0] += (dout * line[here, :, 0]).sum(1)
        dU[left, 1] += (dout * line[here, :, 1]).sum(1)
    places, cells = _places(r, c, A.device), torch.arange(r * c, device=A.device)
    dS = dU[places, :, :, cells].permute(2, 0, 1).unflatten(1, (r, c))
    dA = dline[places].permute(3, 0, 1, 2).unflatten(1, (r, c))
    return dA, dS
