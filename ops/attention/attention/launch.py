"""Tiles of the attention kernels, from head sizes and dtype alone: one fixed choice, no tuning."""

from typing import Any, NamedTuple

import torch

from zoo.ops.core import dispatch

__all__ = ["BLOCK_R", "Launch", "Tile"]

LOG2E = 1.4426950408889634
BLOCK_R = 64  # rows of the kernel that makes D; bound by memory


class Tile(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys; the warps and pipeline stages that work on it; bytes of spills accepted."""

    m: int
    n: int
    warps: int
    stages: int
    spills: int = 0


class Launch(NamedTuple):
    """Tiles of the three large kernels.

    Forward and dq share their queries' block, and keys of dq divide those of the forward: one table serves both.
    """

    block_k: int
    block_v: int
    precision: str
    fwd: Tile
    queries: Tile
    keys: Tile

    @classmethod
    def of(cls, K: int, V: int, dtype: torch.dtype) -> "Launch":
        """Blocks of heads, precision of products and tiles for heads of K and V in this dtype."""
        block_k, block_v = (max(16, 1 << (size - 1).bit_length()) for size in (K, V))
        # half precision has one way only
        wide = dtype == torch.float32
        tiles = _TILES["float32" if wide else "half", max(block_k, block_v, 64)]
        return cls(block_k, block_v, dispatch.EXACT_PRODUCTS if wide else "tf32", *tiles)

    def constants(self, tile: Tile, H: int, HK: int, K: int, V: int, per_row: bool, two: bool) -> dict[str, Any]:
        """The constexpr arguments of one of the three large kernels."""
        return {
            "H": H, "HK": HK, "K": K, "V": V, "PER_ROW": per_row, "TWO": two, "PRECISION": self.precision,
            "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": self.block_k, "BLOCK_V": self.block_v, "LOG2E": LOG2E,
        }  # fmt: skip


# Not timed on a device yet: the largest of the tiles tried that need no register spills on sm_80 and sm_90 (python -m
# zoo.ops.core.compile_kernels attention; four query heads a key head, masks of one and of two intervals). Larger ones:
# half, 128, keys 64 x 64 spill 416 bytes and fwd 128 x 64 48; float32, 64, fwd 64 x 32 spill 24. Where spills are
# accepted, a program holds whole heads of q, or of k and v, as operands, float32 ones in the three parts of tf32x3, and
# smaller tiles do not end it: float32, 256 has the smallest product there is.
_TILES = {
    ("half", 64): (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(32, 128, 8, 2)),
    ("half", 128): (Tile(128, 32, 8, 3), Tile(128, 32, 8, 2), Tile(32, 64, 8, 2, 56)),
    ("half", 256): (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2, 72), Tile(16, 32, 8, 2, 8)),
    ("float32", 64): (Tile(64, 16, 4, 2), Tile(64, 16, 8, 2, 40), Tile(32, 32, 8, 2)),
    ("float32", 128): (Tile(32, 32, 8, 2), Tile(32, 16, 8, 2, 64), Tile(16, 32, 8, 2, 224)),
    ("float32", 256): (Tile(16, 16, 8, 1, 88), Tile(16, 16, 8, 1, 192), Tile(16, 16, 8, 1, 392)),
}
