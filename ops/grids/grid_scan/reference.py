"""The definition of the scan over a grid."""

import torch
from torch import Tensor


def grid_scan_reference(x: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """y[i, j] = a[i, j] * y[i - 1, j] + b[i, j] * y[i, j - 1] + x[i, j], cell after cell; the last row of y.

    x, a, b (B, H, W, D); state (B, W, D) is the row above, and zeros are to the left.
    """
    above, rows = state, []
    for x_i, a_i, b_i in zip(x.unbind(1), a.unbind(1), b.unbind(1), strict=True):
        y, row = torch.zeros_like(state[:, 0]), []
        for j in range(x.shape[2]):
            y = a_i[:, j] * above[:, j] + b_i[:, j] * y + x_i[:, j]  # (B, D)
            row.append(y)
        above = torch.stack(row, dim=1)  # (B, W, D)
        rows.append(above)
    return torch.stack(rows, dim=1), above
