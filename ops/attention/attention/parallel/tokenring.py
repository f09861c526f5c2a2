"""Queries go round and answers come home; keys stay (TokenRing).

Step s of P: seat r has the queries of seat r + s, and sends what it finds for them straight home while the queries go
on. Only rows that some seat ahead answers travel, so that in a zigzag layout half of them make the second part of the
way. Backward the queries go round with do, D and the log-sum-exp, and dq comes home; dk and dv never move.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from zoo.ops.attention.attention.parallel.crossing import Crossing, rows
from zoo.ops.attention.attention.parallel.view import Block
from zoo.ops.attention.attention.parallel.visits import BackwardVisits, ForwardVisits, Visits
from zoo.ops.shard import exchange


class TokenRing(Crossing):
    """Queries go round the ranks, and their answers come straight home."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """o (B, T, H, V) and the log-sum-exp (B, T, H) of this rank's queries."""
        visits = ForwardVisits(q, k, v, self.scale)
        self._round(visits)
        return visits.total.o, visits.total.lse

    def backward(self, inputs: Sequence[Tensor], do: Tensor, D: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this rank's q, k and v, by visits in the same order."""
        q, k, v = inputs
        visits = BackwardVisits(q, k, v, do, D, m, self.scale)
        self._round(visits)
        return visits.dq, visits.dk, visits.dv

    def _round(self, visits: Visits) -> None:
        n, finish = len(self.ranks), None
        visitors, start = list(visits.queries), 0
        for step in range(n):
            owner = (self.seat + step) % n
            coming = self._pass_on(step, visits, visitors, start) if step + 1 < n else None
            block = self.view.block(owner, self.seat)
            answers = visits.host_queries(block, rows(block, *visitors, start=start)) if block else []
            if finish is not None:
                finish()
            if step:
                finish = self._send_home(visits, step, answers)
            elif block:
                visits.take_answers(block, answers)
            if coming is not None:
                visitors = coming.wait().get(self.ranks[(self.seat + 1) % n], [])
                start = self._rows((owner + 1) % n, step + 1)[0]
        if finish is not None:
            finish()

    def _rows(self, owner: int, step: int) -> tuple[int, int]:
        """Rows of the owner's queries that the seats from `step` on answer."""
        n = len(self.ranks)
        blocks = [self.view.block(owner, (owner - s) % n) for s in range(step, n)]
        rows = [block.rows for block in blocks if block]
        return (min(r[0] for r in rows), max(r[1] for r in rows)) if rows else (0, 0)

    def _pass_on(self, step: int, visits: Visits, visitors: Sequence[Tensor], start: int) -> exchange.Meeting:
        """The visiting queries to the seat before, those of the seat after; `visitors` begin at their row `start`."""
        n = len(self.ranks)
        owner = (self.seat + step) % n
        left, right = self._rows(owner, step + 1)
        sends = [x[:, left - start : right - start] for x in visitors]
        first, last = self._rows((owner + 1) % n, step + 1)
        receives = [x.new_empty(1).expand(x.shape[0], last - first, *x.shape[2:]) for x in visits.queries]
        return exchange.meet(
            self.shard,
            {self.ranks[self.seat - 1]: sends} if right > left else {},
            {self.ranks[(self.seat + 1) % n]: receives} if last > first else {},
        )

    def _send_home(self, visits: Visits, step: int, answers: list[Tensor]) -> Callable[[], None]:
        """Answers to their owner, and those to the own queries from the seat as far on the other side."""
        n = len(self.ranks)
        owner, other = self.ranks[(self.seat + step) % n], (self.seat - step) % n
        block: Block | None = self.view.block(self.seat, other)
        receives = {self.ranks[other]: visits.answers(block)} if block else {}
        meeting = exchange.meet(self.shard, {owner: answers} if answers else {}, receives)

        def finish() -> None:
            arrived = meeting.wait()
            if block:
                visits.take_answers(block, arrived[self.ranks[other]])

        return finish
