"""Fast torch form: tiles of cells as masked matrix products, and states on the edges between tiles.

Inside a tile the output is that of attention with weights of paths in place of a softmax, (G * scale Q K^T) V. What
enters a tile is read through the weights of its edges. What leaves it is made of what enters and of the tile's cells.
A small picture is one tile. In a larger one the tiles follow one another, and the cost is linear in their number.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.ops.grids.plstm_grid.weights import tile_weights

# CPU time of forward + backward, float32, B=1 H=4 K=V=64, one core of a busy machine. 32 x 32 cells in tiles of 4 / 8 /
# 16 rows and columns take 308 / 358 / 716 ms. 16 x 16 cells in tiles of 8 take 72 ms, as one tile 203 ms, and 50 ms
# where the outputs alone are asked for. The loop takes 4.5 s and 0.8 s.
WHOLE = 256  # cells of a picture that is one tile, where nothing enters or leaves it
TILE = 8  # rows and columns of a tile of a larger one


def plstm_grid_tiles(
    q: Tensor, k: Tensor, v: Tensor, source: Tensor, transition: Tensor, mark: Tensor, direct: Tensor, above: Tensor,
    *, left: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `plstm_grid_reference`, with edges (B, I, H, K, V) that enter from the left, and those that leave there."""
    tiles = Tiles(q, k, v, source, transition, mark, direct, above.dtype)
    return tiles.outputs(*tiles.through(above, left, scale))


def plstm_grid_alone(
    q: Tensor, k: Tensor, v: Tensor, source: Tensor, transition: Tensor, mark: Tensor, direct: Tensor, scale: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The outputs alone, where nothing enters and nobody asks for what leaves: of a small picture without any state."""
    tiles = Tiles(q, k, v, source, transition, mark, direct, dtype, alone=True)
    if tiles.several:
        above = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1], dtype=dtype)
        return tiles.outputs(*tiles.through(above, None, scale))[0]
    return tiles.picture(tiles.inside(scale))


class Tiles:
    """A picture cut into P x Q tiles of r x c cells; N = B H, n = r c cells and e = c + r edges a tile.

    Cells that only fill a tile hand both edges through and write nothing, so what leaves the tile is right.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, source: Tensor, transition: Tensor, mark: Tensor, direct: Tensor,
        dtype: torch.dtype, *, alone: bool = False,
    ):  # fmt: skip
        self.B, self.I, self.J, self.H = q.shape[:4]
        cells, most = self.I * self.J, WHOLE if alone else TILE * TILE
        self.r, self.c = (self.I, self.J) if cells <= most else (min(TILE, self.I), min(TILE, self.J))
        self.P, self.Q = -(-self.I // self.r), -(-self.J // self.c)
        self.several = self.P * self.Q > 1
        A = torch.cat([transition.to(dtype), mark.to(dtype).unsqueeze(-2)], dim=-2)  # (B, I, J, H, 3, 2)
        S = torch.cat([source.to(dtype), direct.to(dtype).unsqueeze(-1)], dim=-1)
        A = self.cut(A, torch.eye(3, 2, dtype=dtype, device=q.device))
        self.q, self.k, self.v, S = (self.cut(x.to(dtype)) for x in (q, k, v, S))  # (P, Q, N, n, ...)
        tile = (self.r, self.c)
        edges = self.several or not alone
        G = tile_weights(A.flatten(0, 2).unflatten(1, tile), S.flatten(0, 2).unflatten(1, tile), edges=edges)
        self.G = G.unflatten(0, (self.P, self.Q, self.B * self.H))

    def cut(self, x: Tensor, filling: Tensor | None = None) -> Tensor:
        """(B, I, J, H, ...) -> (P, Q, N, n, ...)."""
        down, right = self.P * self.r - self.I, self.Q * self.c - self.J
        if down or right:
            fill = x.new_zeros(()) if filling is None else filling
            x = torch.cat([x, fill.expand(self.B, self.I, right, *x.shape[3:])], dim=2)
            x = torch.cat([x, fill.expand(self.B, down, *x.shape[2:])], dim=1)
        x = x.unflatten(2, (self.Q, self.c)).unflatten(1, (self.P, self.r))  # (B, P, r, Q, c, H, ...)
        return x.movedim((1, 3, 0, 5, 2, 4), (0, 1, 2, 3, 4, 5)).flatten(4, 5).flatten(2, 3)

    def picture(self, o: Tensor) -> Tensor:
        """(P, Q, N, n, V) -> (B, I, J, H, V)."""
        o = o.unflatten(3, (self.r, self.c)).unflatten(2, (self.B, self.H))  # (P, Q, B, H, r, c, V)
        picture: Tensor = o.permute(2, 0, 4, 1, 5, 3, 6).flatten(3, 4).flatten(1, 2)
        return picture[:, : self.I, : self.J]

    def inside(self, scale: float) -> Tensor:
        """What cells read of their own tile, (P, Q, N, n, V)."""
        n = self.r * self.c
        o: Tensor = ((self.q * scale @ self.k.mT) * self.G[..., :n, :n]) @ self.v
        return o

    def through(self, above: Tensor, left: Tensor | None, scale: float) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Outputs by tile, the edges (N, c, K, V) below each column of tiles, those (N, r, K, V) beside each row."""
        n, K, V = self.r * self.c, self.q.shape[-1], self.v.shape[-1]
        into, out, past = self.G[..., :n, n:], self.G[..., n:, :n], self.G[..., n:, n:]
        # unbind, not x[p, j]: the gradient of an index is as large as x, for every tile
        each = (into, out, past, self.inside(scale), self.q * scale, self.k, self.v)
        tiles = iter(zip(*(x.flatten(0, 1).unbind() for x in each), strict=True))
        down = list(self._edges(above, self.Q, self.c))
        beside = None if left is None else self._edges(left, self.P, self.r)
        rows, ends = [], []
        for p in range(self.P):
            right = down[0].new_zeros(self.B * self.H, self.r, K, V) if beside is None else beside[p]
            row = []
            for j in range(self.Q):
                enters, leaves, passes, o, q, k, v = next(tiles)
                C = torch.cat([down[j], right], dim=1)  # (N, e, K, V)
                read = (enters.unsqueeze(-1) * q.unsqueeze(2)).flatten(2)  # (N, n, e K)
                row.append(torch.baddbmm(o, read, C.flatten(1, 2)))
                written = (leaves.unsqueeze(-1) * k.unsqueeze(1)).mT @ v.unsqueeze(1)  # (N, e, K, V)
                C = written + (passes @ C.flatten(2)).unflatten(2, (K, V))
                down[j], right = C.split([self.c, self.r], dim=1)
            rows.append(torch.stack(row))
            ends.append(right)
        return torch.stack(rows), down, ends

    def _edges(self, x: Tensor, parts: int, size: int) -> Tensor:
        """(B, J, H, K, V) -> (Q, N, c, K, V), and the same for rows."""
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, parts * size - x.shape[1])).unflatten(1, (parts, size))
        return x.permute(1, 0, 3, 2, 4, 5).flatten(1, 2)

    def outputs(self, o: Tensor, down: list[Tensor], ends: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The picture, the edges below it (B, J, H, K, V) and those to the right of it (B, I, H, K, V)."""

        def joined(parts: list[Tensor], size: int) -> Tensor:
            edges: Tensor = torch.cat(parts, dim=1).unflatten(0, (self.B, self.H))
            return edges.transpose(1, 2)[:, :size]

        return self.picture(o), joined(down, self.J), joined(ends, self.I)
