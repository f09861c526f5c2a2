"""One block of two seats, worked on at either: keys that visit queries, or queries that visit keys.

The same block is attended to whichever of the two moves. Where queries visit, their answers (o and lse, or dq) go home;
where keys visit, what is found for them (dk and dv) does.
"""

from collections.abc import Sequence

from torch import Tensor

from zoo.ops.attention.attention.parallel import local
from zoo.ops.attention.attention.parallel.crossing import columns, rows, sums_like
from zoo.ops.attention.attention.parallel.view import Block


class Visits:
    """What goes between two seats in one pass, seen from one of them: `queries` and `keys` are its own."""

    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, Tensor]

    def host_queries(self, block: Block, visitors: Sequence[Tensor]) -> list[Tensor]:
        """The block's rows of another seat's `queries`, and own keys -> answers."""
        raise NotImplementedError

    def answers(self, block: Block) -> list[Tensor]:
        """Where answers to the block's rows of the own queries belong; of their shape."""
        raise NotImplementedError

    def take_answers(self, block: Block, answers: Sequence[Tensor]) -> None:
        """Add what a host made of this rank's queries."""
        raise NotImplementedError

    def host_keys(self, block: Block, visitors: Sequence[Tensor]) -> list[Tensor]:
        """The block's columns of another seat's `keys`, and own queries -> what goes back to the keys."""
        raise NotImplementedError

    def returns(self, block: Block) -> list[Tensor]:
        """Where what comes back to the block's columns of the own keys belongs."""
        return []

    def take_returns(self, block: Block, parts: Sequence[Tensor]) -> None:
        """Add what a host made for keys of this rank that it had visited."""
        for x, part in zip(self.returns(block), parts, strict=True):
            x.add_(part)


class ForwardVisits(Visits):
    """Partial outputs and log-sum-exps, merged as they come."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float):
        self.queries, self.keys, self.scale = (q,), (k, v), scale
        self.total = local.Sum(q, v)

    def host_queries(self, block: Block, visitors: Sequence[Tensor]) -> list[Tensor]:
        """Answer the queries of a visitor with this rank's keys: partial o and log-sum-exp."""
        k, v = columns(block, *self.keys)
        return list(local.forward(visitors[0], k, v, block=block, scale=self.scale))

    def answers(self, block: Block) -> list[Tensor]:
        """The partial results of the block's rows of this rank's queries, as far as they are merged."""
        return rows(block, self.total.o, self.total.lse)

    def take_answers(self, block: Block, answers: Sequence[Tensor]) -> None:
        """Merge partial results of a host into those of this rank's queries."""
        o, lse = answers
        self.total.add(block.rows, o, lse)

    def host_keys(self, block: Block, visitors: Sequence[Tensor]) -> list[Tensor]:
        """Let this rank's queries see the keys of a visitor."""
        (q,), (k, v) = rows(block, *self.queries), visitors
        o, lse = local.forward(q, k, v, block=block, scale=self.scale)
        self.total.add(block.rows, o, lse)
        return []


class BackwardVisits(Visits):
    """Gradients of queries, keys and values, summed as they come."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, D: Tensor, m: Tensor, scale: float):
        self.queries, self.keys, self.scale = (q, do, D, m), (k, v), scale
        self.dq, self.dk, self.dv = sums_like(q, k, v)

    def host_queries(self, block: Block, visitors: Sequence[Tensor]) -> list[Tensor]:
        """Take the queries of a visitor to this rank's keys: their dq goes back, dk and dv stay."""
        (q, do, D, m), (k, v) = visitors, columns(block, *self.keys)
        dq, *returns = local.backward(q, k, v, do, D, m, block=block, scale=self.scale)
        self.take_returns(block, returns)
        return [dq]

    def answers(self, block: Block) -> list[Tensor]:
        """The sums of dq of a block of this rank's queries."""
        return rows(block, self.dq)

    def take_answers(self, block: Block, answers: Sequence[Tensor]) -> None:
        """Add a host's dq of a block to this rank's."""
        self.answers(block)[0].add_(answers[0])

    def host_keys(self, block: Block, visitors: Sequence[Tensor]) -> list[Tensor]:
        """Let this rank's queries see the keys of a visitor: dq stays, its dk and dv go back."""
        (q, do, D, m), (k, v) = rows(block, *self.queries), visitors
        dq, dk, dv = local.backward(q, k, v, do, D, m, block=block, scale=self.scale)
        self.take_answers(block, [dq])
        return [dk, dv]

    def returns(self, block: Block) -> list[Tensor]:
        """dk and dv of a visitor's keys, which go back to it."""
        return columns(block, self.dk, self.dv)
