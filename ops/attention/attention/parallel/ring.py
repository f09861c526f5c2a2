"""Keys and values go round; queries stay (Ring Attention, and by the layout zigzag and striped).

Step s of P: seat r has what seat r - s holds. The next step's keys travel while this one's are attended to. Backward
they go round again, and behind them the gradients of whoever they belong to: those of the first step stay at home, so
that they take P - 1 hops, the last of which brings them back.
"""

from collections.abc import Sequence

from torch import Tensor

from zoo.ops.attention.attention.parallel.crossing import Crossing, add_gradients, add_part, sums_like
from zoo.ops.attention.attention.parallel.local import Sum
from zoo.ops.shard import exchange


class Ring(Crossing):
    """Keys and values go round the ranks; each rank adds what its queries see of them."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """o (B, T, H, V) and the log-sum-exp (B, T, H) of this rank's queries."""
        total, keys = Sum(q, v), self.travelling(k, v)
        n = len(self.ranks)
        for step in range(n):
            source = (self.seat - step) % n
            coming = self._turn(source, *keys) if step + 1 < n else None
            self.add_part(total, source, q, keys)
            if coming is not None:
                keys = coming.wait()[self._previous]
        return total.o, total.lse

    def backward(self, inputs: Sequence[Tensor], do: Tensor, D: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this rank's q, k and v; those of keys travel with the keys and end at home."""
        q, k, v = inputs
        (dq,) = sums_like(q)
        home, keys = sums_like(k, v), self.travelling(k, v)
        n = len(self.ranks)
        behind = None  # gradients under way, one hop behind their keys
        for step in range(n):
            source = (self.seat - step) % n
            coming = self._turn(source, *keys) if step + 1 < n else None
            dk, dv = sums_like(*keys[:2]) if step else home
            self.add_gradients((dq, dk, dv), source, q, keys, do, D, m)
            if behind is not None:
                for x, part in zip((dk, dv), behind.wait()[self._previous], strict=True):
                    x.add_(part)
            if step:
                behind = self._turn(source, dk, dv)
            if coming is not None:
                keys = coming.wait()[self._previous]
        if behind is not None:
            for x, part in zip(home, behind.wait()[self._previous], strict=True):
                x.add_(part)
        return dq, *home  # type: ignore[return-value]

    def travelling(self, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        """What goes round: keys, values, and whatever else belongs to them, (B, S, ...) each."""
        return k, v

    def add_part(self, total: Sum, source: int, q: Tensor, keys: Sequence[Tensor]) -> None:
        """Let this rank's queries see what travels of seat `source`."""
        add_part(total, self.view.block(self.seat, source), q, keys[0], keys[1], self.scale)

    def add_gradients(
        self, into: tuple[Tensor, Tensor, Tensor], source: int, q: Tensor, keys: Sequence[Tensor], do: Tensor,
        D: Tensor, m: Tensor,
    ) -> None:  # fmt: skip
        """The same for gradients, added into (dq, dk, dv)."""
        block = self.view.block(self.seat, source)
        add_gradients(into, block, q, keys[0], keys[1], do, D, m, self.scale)

    @property
    def _previous(self) -> int:
        return self.ranks[self.seat - 1]

    def _turn(self, source: int, *tensors: Tensor) -> exchange.Meeting:
        """Hand on what belongs to seat `source`; what belongs to the seat before it comes."""
        n = len(self.ranks)
        coming = [self.like(x, (source - 1) % n) for x in tensors]
        return exchange.meet(self.shard, {self.ranks[(self.seat + 1) % n]: tensors}, {self._previous: coming})
