"""Recurrences over pictures that are cut into strips of rows: a strip's edge goes from rank to rank.

A step sees its neighbour above and its neighbour to the left. So the last row of a strip is all that the next strip
asks for, and it asks for it column by column: rank r runs columns k while rank r + 1 runs columns k - 1.

    rank 0   | 0 | 1 | 2 | 3 |            time ->   0  1  2  3
    ---------+---+---+---+---+  edge                   0  1  2  3
    rank 1   | 0 | 1 | 2 | 3 |

The map from a row to a later one is a dense matrix of columns for each channel, so no summary of a strip is smaller
than the strip, and the ranks work one after the other, on micro-batches side by side. The backward pass runs them in
reverse, from the last rank to the first. Recurrences that go up run inside `from_the_right()` on flipped rows.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zoo.ops.core.autograd import apply
from zoo.ops.shard.scope import scope, use
from zoo.ops.shard.serial import _Receive, _Send

Run = Callable[..., tuple[Tensor, Tensor, Tensor]]


def frontier(
    run: Run, inputs: Sequence[Tensor], edge: Tensor, *, groups: int | None = None, blocks: int | None = None
) -> tuple[Tensor, Tensor]:
    """Run a strip below the edge that comes from the ranks before.

    Args:
        run: (*inputs (B, H, w, ...), edge (B, w, ...), left (B, H, ...) or None) -> (y (B, h, w, ...), the last row
            (B, w, ...), the last column (B, H, ...)) on neighbouring columns; left is the last column of the columns
            before, None at the picture's own border. Row by row of the batch independent.
        inputs: this rank's strip, (B, H, W, ...) each, the rows of an input of its own number; fold heads and
            directions into the batch.
        edge: (B, W, ...), the row above the strip, kept on the first rank and replaced by what arrives on the others.
        groups: parts of the batch that are handed on one after the other; as many as give four micro-batches a rank,
            at most B, when omitted.
        blocks: parts of the columns; as many as give four micro-batches a rank beside the groups, when omitted.

    Returns:
        y, (B, h, W, ...), and the last row, (B, W, ...). Without a shard, those of one call.

    Raises:
        ValueError: the shard's layout is not contiguous.

    Cost: one edge received and one sent each way, in groups x blocks messages. P ranks are busy G / (G + P - 1) of the
        time with G = groups x blocks.
    """
    active = scope()
    if active is None or active.shard.size == 1:
        y, last, _ = run(*inputs, edge, None)
        return y, last
    active.shard.require_contiguous("a recurrence over a picture's rows")
    wanted, (rows, columns) = 4 * active.shard.size, edge.shape[:2]
    groups = max(1, min(rows, wanted if groups is None else groups))
    blocks = max(1, min(columns, math.ceil(wanted / groups) if blocks is None else blocks))
    outputs, edges = [], []
    for *strip, above in zip(*(x.tensor_split(groups) for x in (*inputs, edge)), strict=True):
        left, ys, lasts = None, [], []
        cut = [x.tensor_split(blocks, dim=2) for x in strip]
        for *parts, before in zip(*cut, above.tensor_split(blocks, dim=1), strict=True):
            before = apply(_Receive, active, before, *parts)
            with use(None):
                y, last, left = run(*parts, before, left)
            y, last = apply(_Send, active, y, last)
            ys.append(y)
            lasts.append(last)
        outputs.append(torch.cat(ys, dim=2))
        edges.append(torch.cat(lasts, dim=1))
    return torch.cat(outputs), torch.cat(edges)
