"""Any mask across ranks: keys come to the queries as in "allgather", and with each key the intervals that see it.

Labels stay with their queries, whatever the layout, since a `Visible` asks for no order of the keys.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.ops.attention.attention.blockwise import attend, gradients
from zoo.ops.attention.attention.parallel.gathered import Gathered
from zoo.ops.attention.attention.parallel.view import View
from zoo.ops.attention.attention.visible import Visible
from zoo.ops.attention.attention.visible_blocks import VisibleBlocks
from zoo.ops.core.dispatch import state_dtype
from zoo.ops.shard.sequence_shard import SequenceShard

__all__ = ["ByLabels"]


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
            own = torch.stack([x for each in self.visible.intervals for x in each], dim=2)  # (B, own keys, 2 or 4)
            self.whole = Visible(self.visible.label, *(x.contiguous() for x in self._fetch(own).unbind(2)))
        return self.whole
