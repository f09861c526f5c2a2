"""Early ranks help late ones, so that causal attention is balanced in a contiguous layout (DistFlashAttn, LightSeq).

Rank r has r blocks of other ranks' keys to attend to. At time t = 1 ... P // 2 the ranks r >= t fetch the keys of rank
r - t for their own queries; the ranks r < t, which have none left, fetch the queries of rank r - t + P and send the
answers back. So distances t are worked on at home and distances P - t by helpers, and all are done after P // 2 + 1
times: for an odd P nobody is ever idle; for an even one the helpers are at t = P / 2, whose distance is its own other
half. What the next time needs travels during this one, what this one found during the next.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from zoo.ops.attention.attention.parallel.crossing import Crossing, columns, rows
from zoo.ops.attention.attention.parallel.visits import BackwardVisits, ForwardVisits, Visits
from zoo.ops.shard import exchange


class LightSeq(Crossing):
    """Early ranks, which have few keys before them, work on the queries of late ones."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """o (B, T, H, V) and the log-sum-exp (B, T, H) of this rank's queries."""
        visits = ForwardVisits(q, k, v, self.scale)
        self._run(visits)
        return visits.total.o, visits.total.lse

    def backward(self, inputs: Sequence[Tensor], do: Tensor, D: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this rank's q, k and v, with the same helpers."""
        q, k, v = inputs
        visits = BackwardVisits(q, k, v, do, D, m, self.scale)
        self._run(visits)
        return visits.dq, visits.dk, visits.dv

    def source(self, time: int) -> int | None:
        """Whose keys come here for the own queries."""
        return self.seat - time if self.seat >= time else None

    def helped(self, time: int) -> int | None:
        """Whose queries come here for the own keys."""
        n = len(self.ranks)
        return self.seat - time + n if self.seat < time and 2 * time < n else None

    def reader(self, time: int) -> int | None:
        """Where the own keys go."""
        return self.seat + time if self.seat + time < len(self.ranks) else None

    def helper(self, time: int) -> int | None:
        """Where the own queries go."""
        n = len(self.ranks)
        return self.seat + time - n if self.seat + time >= n and 2 * time < n else None

    def _run(self, visits: Visits) -> None:
        last, finish = len(self.ranks) // 2, None
        visitors: Sequence[Tensor] = []
        for time in range(last + 1):
            coming = self._bring(visits, time + 1) if time < last else None
            made = self._work(visits, time, visitors)
            if finish is not None:
                finish()
            finish = self._send_back(visits, time, made) if time else None
            if coming is not None:
                (visitors,) = coming.wait().values() or ([],)
        if finish is not None:
            finish()

    def _bring(self, visits: Visits, time: int) -> exchange.Meeting:
        """Keys to their reader, queries to their helper, and what is worked on here at `time`."""
        sends: dict[int, Sequence[Tensor]] = {}
        receives: dict[int, Sequence[Tensor]] = {}
        reader, helper, source, helped = self.reader(time), self.helper(time), self.source(time), self.helped(time)
        if reader is not None and (block := self.view.block(reader, self.seat)):
            sends[self.ranks[reader]] = columns(block, *visits.keys)
        if helper is not None and (block := self.view.block(self.seat, helper)):
            sends[self.ranks[helper]] = rows(block, *visits.queries)
        if source is not None and (block := self.view.block(self.seat, source)):
            receives[self.ranks[source]] = columns(block, *(self.like(x, source) for x in visits.keys))
        if helped is not None and (block := self.view.block(helped, self.seat)):
            receives[self.ranks[helped]] = rows(block, *(self.like(x, helped) for x in visits.queries))
        return exchange.meet(self.shard, sends, receives)

    def _work(self, visits: Visits, time: int, visitors: Sequence[Tensor]) -> list[Tensor]:
        """The block of this time; what was found for whom it belongs to."""
        source, helped = self.source(time), self.helped(time)
        if source is not None and (block := self.view.block(self.seat, source)):
            if time:
                return visits.host_keys(block, visitors)
            visits.take_answers(block, visits.host_queries(block, rows(block, *visits.queries)))
        if helped is not None and (block := self.view.block(helped, self.seat)):
            return visits.host_queries(block, visitors)
        return []

    def _send_back(self, visits: Visits, time: int, made: list[Tensor]) -> Callable[[], None]:
        """What was found to whose keys or queries visited, and what others found for the own."""
        source, helped, reader, helper = self.source(time), self.helped(time), self.reader(time), self.helper(time)
        visited = helped if source is None else source
        returned = None if reader is None else self.view.block(reader, self.seat)
        answered = None if helper is None else self.view.block(self.seat, helper)
        receives: dict[int, Sequence[Tensor]] = {}
        if reader is not None and returned:
            receives[self.ranks[reader]] = visits.returns(returned)
        if helper is not None and answered:
            receives[self.ranks[helper]] = visits.answers(answered)
        sends = {self.ranks[visited]: made} if visited is not None and made else {}
        meeting = exchange.meet(self.shard, sends, receives)

        def finish() -> None:
            arrived = meeting.wait()
            if reader is not None and returned:
                visits.take_returns(returned, arrived[self.ranks[reader]])
            if helper is not None and answered:
                visits.take_answers(answered, arrived[self.ranks[helper]])

        return finish
