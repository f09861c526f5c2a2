"""Keys and values come to the queries, and one call attends to them: no merge, any mask, any layout.

`Gathered`: everything, by an all-gather; gradients return by a reduce-scatter (Llama 3, LASP-2H). `Reached`: only what
some query sees, from whoever holds it; with a window that is a halo of window - 1 keys, whatever the length. Backward
both fetch again what they did not keep.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from zoo.ops.attention.attention.parallel.crossing import Crossing, add_gradients, add_part, columns, sums_like
from zoo.ops.attention.attention.parallel.local import Sum
from zoo.ops.attention.attention.parallel.view import Block
from zoo.ops.shard import exchange


class Gathered(Crossing):
    """All keys and values on every rank: one gather forward, one sum of their gradients backward."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """o (B, T, H, V) and the log-sum-exp (B, T, H) of this rank's queries."""
        total = Sum(q, v)
        k, v = self._fetch(k), self._fetch(v)
        add_part(total, self._block(), q, k, v, self.scale)
        return total.o, total.lse

    def backward(self, inputs: Sequence[Tensor], do: Tensor, D: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this rank's q, k and v; those of gathered keys are summed where the keys came from."""
        q, k, v = inputs
        k, v = self._fetch(k), self._fetch(v)
        (dq,) = sums_like(q)
        dk, dv = sums_like(k, v)
        add_gradients((dq, dk, dv), self._block(), q, k, v, do, D, m, self.scale)
        return dq, self._give_back(dk), self._give_back(dv)

    def _block(self) -> Block | None:
        """The own queries and what was fetched."""
        return self.view.block(self.seat, None)

    def _fetch(self, x: Tensor) -> Tensor:
        """(B, own tokens, ...) -> (B, all tokens, ...) in order of time."""
        if self._even():
            parts = exchange.all_gather(self.shard, x)
        else:
            likes = [self.like(x, seat) for seat in range(self.shard.size)]
            parts = exchange.all_to_all(self.shard, [x] * self.shard.size, likes)
        everything = torch.cat(parts, dim=1)
        if self.shard.layout == "contiguous":
            return everything
        return everything[:, self._tokens(x).argsort()]

    def _give_back(self, dx: Tensor) -> Tensor:
        """Gradients of all tokens -> the own ones', summed over ranks."""
        if self.shard.layout != "contiguous":
            dx = dx[:, self._tokens(dx)]
        parts = dx.split([self.view.tokens(seat) for seat in range(self.shard.size)], dim=1)
        if self._even():
            return exchange.reduce_scatter(self.shard, torch.stack(parts))
        arrived = exchange.all_to_all(self.shard, parts, [parts[self.seat]] * self.shard.size)
        return torch.stack(arrived).sum(0)

    def _even(self) -> bool:
        return len({self.view.tokens(seat) for seat in range(self.shard.size)}) == 1

    def _tokens(self, x: Tensor) -> Tensor:
        """All tokens in order of ranks."""
        return torch.cat(self.view.seats).to(x.device)


class Reached(Gathered):
    """In a contiguous layout, where what the queries of a rank reach is one stretch of time around its own."""

    def _block(self) -> Block | None:
        block = super()._block()
        return block and block._replace(columns=(0, block.columns[1] - block.columns[0]))

    def _fetch(self, x: Tensor) -> Tensor:
        wanted, asked = self._pairs()
        receives = {seat: columns(block, self.like(x, seat)) for seat, block in wanted.items()}
        arrived = exchange.meet(self.shard, {seat: columns(b, x) for seat, b in asked.items()}, receives).wait()
        parts = {seat: tensors[0] for seat, tensors in arrived.items()} | {self.seat: x}
        return torch.cat([parts[seat] for seat in sorted(parts)], dim=1)

    def _give_back(self, dx: Tensor) -> Tensor:
        wanted, asked = self._pairs()
        widths = {seat: b.columns[1] - b.columns[0] for seat, b in wanted.items()} | {
            self.seat: self.view.tokens(self.seat)
        }
        parts = dict(zip(sorted(widths), dx.split([widths[seat] for seat in sorted(widths)], dim=1), strict=True))
        own: Tensor = parts[self.seat].clone()
        receives = {seat: columns(block, own) for seat, block in asked.items()}
        arrived = exchange.meet(self.shard, {seat: [parts[seat]] for seat in wanted}, receives).wait()
        for seat, block in asked.items():
            columns(block, own)[0].add_(arrived[seat][0])
        return own

    def _pairs(self) -> tuple[dict[int, Block], dict[int, Block]]:
        """Whose keys are reached from here, and who reaches the own."""
        others = [seat for seat in range(self.shard.size) if seat != self.seat]
        wanted = {seat: self.view.block(self.seat, seat) for seat in others}
        asked = {seat: self.view.block(seat, self.seat) for seat in others}
        return cast(
            tuple[dict[int, Block], dict[int, Block]],
            tuple({seat: b for seat, b in blocks.items() if b is not None} for blocks in (wanted, asked)),
        )
