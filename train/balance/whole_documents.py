"""Whole sequences dealt out to ranks, one micro-step each: what ordinary data parallelism makes of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zoo.train.balance.plan import Group, Plan, as_lengths


@dataclass(frozen=True)
class Dealt:
    """No sequence is cut and none waits: longest first, each to the rank with the fewest tokens. No limit of memory.

    Args:
        ranks: how many.
    """

    ranks: int

    def __call__(self, lengths: Sequence[int] | np.ndarray) -> Plan:
        """A plan for a batch; a rank has no group where there are fewer sequences than ranks."""
        s = as_lengths(lengths)
        had, owned = np.zeros(self.ranks, np.int64), [[] for _ in range(self.ranks)]  # type: ignore[var-annotated]
        for k in np.argsort(-s, kind="stable").tolist():
            rank = int(had.argmin())
            had[rank] += s[k]
            owned[rank].append(k)
        groups = tuple(Group((rank,), tuple(sequences)) for rank, sequences in enumerate(owned) if sequences)
        return Plan(tuple(s.tolist()), self.ranks, (groups,))
