"""The plan of models without attention: one stream of documents, cut into equal ranges. No solver.

Their work is proportional to tokens, and a cut costs one state per layer whatever the length, so that equal tokens are
equal work: every rank runs every step, receives at most one state and sends at most one, and at most ranks - 1
documents are cut.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zoo.train.balance.micro_batches import consecutive_parts
from zoo.train.balance.plan import Group, Plan, as_lengths, refuse_too_long


@dataclass(frozen=True)
class PackedStream:
    """All ranks share every step; documents stay in the order in which they came.

    Args:
        ranks: how many.
        capacity: tokens that fit on a rank.
        chunk: cuts are multiples of it; the chunk length of the operators keeps their kernels' blocks full.
    """

    ranks: int
    capacity: int
    chunk: int = 64

    def __post_init__(self) -> None:
        if self.capacity < self.chunk:
            raise ValueError(
                f"PackedStream: a rank must have room for one chunk of {self.chunk} tokens; got a capacity of "
                f"{self.capacity}, lower the chunk"
            )

    def __call__(self, lengths: Sequence[int] | np.ndarray) -> Plan:
        """A plan for a batch: the fewest steps that hold its documents whole, as even as can be.

        Raises:
            ValueError: a document does not fit on all ranks together.
        """
        s = as_lengths(lengths)
        room = self.capacity // self.chunk * self.chunk
        refuse_too_long(s, room, self.ranks)
        steps = -(-int(s.sum()) // (self.ranks * room))
        while True:
            cuts = consecutive_parts(s, steps)
            if max(int(s[i:j].sum()) for i, j in itertools.pairwise(cuts)) <= self.ranks * room:
                break
            steps += 1
        everyone = tuple(range(self.ranks))
        groups = tuple((Group(everyone, tuple(range(i, j))),) for i, j in itertools.pairwise(cuts))
        return Plan(tuple(s.tolist()), self.ranks, groups, chunk=self.chunk, lockstep=True)
