"""Any mask across ranks: keys come to the queries all at once or by a ring, and with them the intervals that see them.

Labels stay with their queries, whatever the layout, since a `Visible` asks for no order of the keys.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.ops.attention.attention.blockwise import attend, gradients
from zoo.ops.attention.attention.parallel.gathered import Gathered
from zoo.ops.attention.attention.parallel.local import Sum
from zoo.ops.attention.attention.parallel.ring import Ring
from zoo.ops.attention.attention.parallel.view import View
from zoo.ops.attention.attention.visible import Visible
from zoo.ops.attention.attention.visible_blocks import VisibleBlocks
from zoo.ops.core.dispatch import state_dtype
from zoo.ops.shard.sequence_shard import SequenceShard

__all__ = ["ByLabels", "RingByLabels"]


class ByLabels(Gathered):
    """All keys, values and intervals on every rank.

    Args:
        shard, view, scale: as of every crossing.
        visible: labels of the rank's own queries, intervals of its own keys.
    """

    def __init__(self, shard: SequenceShard, view: View, scale: float, visible: Visible):
        super().__init__(shard, view, scale)
        self.visible = visible
        self.whole: Visible | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """o (B, T, H, V) and the log-sum-exp (B, T, H) of this rank's queries."""
        at = VisibleBlocks(q, self._fetch(k), self._fetch(v), self._everyone(), self.scale)
        o, m, log_l = attend(at, state_dtype(q))
        return o, (m + log_l).masked_fill_(m == float("inf"), float("-inf"))

    def backward(self, inputs: Sequence[Tensor], do: Tensor, D: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this rank's q, k and v; those of gathered keys are summed where the keys came from."""
        q, k, v = inputs
        at = VisibleBlocks(q, self._fetch(k), self._fetch(v), self._everyone(), self.scale)
        dq, dk, dv = gradients(at, do, D, m, None, at.dtype)
        return dq, self._give_back(dk.contiguous()), self._give_back(dv.contiguous())

    def _everyone(self) -> Visible:
        """Own labels, and the intervals of all keys. A recomputation, which runs no forward, asks for them here."""
        if self.whole is None:
            self.whole = _with_intervals(self.visible, self._fetch(_intervals(self.visible)))
        return self.whole


class RingByLabels(Ring):
    """Keys, values and intervals go round the ranks; arguments are those of `ByLabels`."""

    def __init__(self, shard: SequenceShard, view: View, scale: float, visible: Visible):
        super().__init__(shard, view, scale)
        self.visible = visible

    def travelling(self, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        """Keys, values, and their intervals."""
        return k, v, _intervals(self.visible)

    def add_part(self, total: Sum, source: int, q: Tensor, keys: Sequence[Tensor]) -> None:
        """Let this rank's queries see what travels, as far as the intervals say."""
        k, v, intervals = keys
        o, m, log_l = attend(
            VisibleBlocks(q, k, v, _with_intervals(self.visible, intervals), self.scale), state_dtype(q)
        )
        total.add((0, q.shape[1]), o, (m + log_l).masked_fill_(m == float("inf"), float("-inf")))

    def add_gradients(
        self, into: tuple[Tensor, Tensor, Tensor], source: int, q: Tensor, keys: Sequence[Tensor], do: Tensor,
        D: Tensor, m: Tensor,
    ) -> None:  # fmt: skip
        """The same for gradients, added into (dq, dk, dv)."""
        k, v, intervals = keys
        at = VisibleBlocks(q, k, v, _with_intervals(self.visible, intervals), self.scale)
        for x, part in zip(into, gradients(at, do, D, m, None, at.dtype), strict=True):
            x.add_(part)


def _intervals(visible: Visible) -> Tensor:
    """(B, keys, 2 or 4): first and end of every interval, as they travel."""
    return torch.stack([x for each in visible.intervals for x in each], dim=2)


def _with_intervals(visible: Visible, intervals: Tensor) -> Visible:
    """The labels of `visible` before the keys of these intervals."""
    return Visible(visible.label, *(x.contiguous() for x in intervals.unbind(2)))
