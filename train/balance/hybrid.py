"""Any number of ranks per sequence, any number of micro-steps per rank: hybrid data parallelism.

ByteScale's idea (arXiv 2502.21231): a sequence of s tokens takes ceil(s / C) ranks of C tokens, whatever that number
is, and short ones are packed on single ranks; the gradient is a sum over all tokens of an update, so that ranks need
not run the same number of micro-steps and meet only at its end. That wants replicated weights (DDP, ZeRO-1) and
point-to-point rings on one global group, since sets of ranks are too many to make a group of each.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from zoo.train.balance.cost import CostModel
from zoo.train.balance.plan import Group, Plan, as_lengths, refuse_too_long

# How much longer than the others a sequence may take before it gets more ranks than it needs, as shares of the best
# finish that is possible; the plan that is done first wins.
TARGETS = (1.0, 1.25, 1.6, 2.0, np.inf)


@dataclass(frozen=True)
class Hybrid:
    """Plans with rings of any size and unequal numbers of micro-steps.

    Args:
        ranks: how many.
        cost: what micro-steps cost; its capacity is C.
        balance: "time": long sequences first on the ranks that are free first, short ones where there is time left.
            "tokens": every rank like numbers of full micro-steps, whatever their time; ByteScale's naive form.
        chunk: cuts inside a ring are multiples of it.
    """

    ranks: int
    cost: CostModel
    balance: Literal["time", "tokens"] = "time"
    chunk: int = 1

    def __post_init__(self) -> None:
        if self.balance not in ("time", "tokens"):
            raise ValueError(f'Hybrid: balance must be "time" or "tokens"; got {self.balance!r}')

    def __call__(self, lengths: Sequence[int] | np.ndarray) -> Plan:
        """A plan for a batch.

        Raises:
            ValueError: a sequence does not fit on all ranks together.

        Cost: O(n log n), and n log(ranks) for every target that is tried.
        """
        s, cost = as_lengths(lengths), self.cost.in_chunks(self.chunk)
        refuse_too_long(s, cost.capacity, self.ranks)
        if self.balance == "tokens":
            groups = _by_tokens(s, self.ranks, cost)
        else:
            tried = dict.fromkeys(_degrees(s, self.ranks, cost))
            groups = min((_by_time(s, d, self.ranks, cost) for d in tried), key=lambda timed: timed[0])[1]
        return Plan(tuple(s.tolist()), self.ranks, tuple((group,) for group in groups), chunk=self.chunk)


def _degrees(s: np.ndarray, ranks: int, cost: CostModel) -> list[tuple[int, ...]]:
    """Ranks of every sequence, for each target: the fewest that have room and finish in time."""
    least = cost.least_degree(s)
    whole = float((cost.time(s, least) * least).sum()) / ranks
    long = np.flatnonzero(least > 1)
    choices = []
    for target in TARGETS:
        degrees = least.copy()
        for k in long:
            options = np.arange(least[k], ranks + 1)
            times = _times(int(s[k]), options, cost)
            in_time = np.flatnonzero(times <= target * whole)
            degrees[k] = options[in_time[0] if len(in_time) else int(times.argmin())]
        choices.append(tuple(degrees.tolist()))
    return choices


def _times(tokens: int, degrees: np.ndarray, cost: CostModel) -> np.ndarray:
    """A sequence alone in a micro-step, on every number of ranks that the communication is known for."""
    times = cost.time(np.full(len(degrees), tokens), degrees)
    whole: np.ndarray = times + np.array([cost.fixed(int(d)) for d in degrees])
    return whole


def _by_time(s: np.ndarray, degrees: Sequence[int], ranks: int, cost: CostModel) -> tuple[float, list[Group]]:
    """Longest time first: rings on the ranks that are free first, then single ranks, packed."""
    room = cost.capacity
    d = np.asarray(degrees)
    times = cost.time(s, d)
    order = sorted(range(len(s)), key=lambda k: (d[k] == 1, -times[k], -s[k], k))
    rings, free = [], np.zeros(ranks)
    for k in (k for k in order if d[k] > 1):
        ring = np.sort(np.argsort(free, kind="stable")[: d[k]])
        rings.append(Group(tuple(ring.tolist()), (k,)))
        free[ring] = free[ring].max() + times[k] + cost.fixed(int(d[k]))
    heap = [(float(t), r) for r, t in enumerate(free)]
    heapq.heapify(heap)
    packs: list[list[tuple[int, list[int]]]] = [[] for _ in range(ranks)]  # (room left, sequences) of each
    for k in (k for k in order if d[k] == 1):
        t, r = heapq.heappop(heap)
        own, tokens = packs[r], int(s[k])
        fits = [i for i, (left, _) in enumerate(own) if left >= tokens]
        if fits:
            i = min(fits, key=lambda i: own[i][0])  # best fit
            own[i] = (own[i][0] - tokens, [*own[i][1], k])
        else:
            own.append((room - tokens, [k]))
            t += cost.fixed(1)
        heapq.heappush(heap, (t + float(times[k]), r))
    single = [Group((r,), tuple(sequences)) for r, own in enumerate(packs) for _, sequences in own]
    return max(t for t, _ in heap), rings + single


def _by_tokens(s: np.ndarray, ranks: int, cost: CostModel) -> list[Group]:
    """Long sequences as they come, then packs of C tokens, each on the ranks that have had fewest micro-steps."""
    room, d = cost.capacity, cost.least_degree(s)
    packs: list[tuple[int, list[int]]] = []
    for k in sorted((k for k in range(len(s)) if d[k] == 1), key=lambda k: -s[k]):
        # best fit among the last packs: sorted by length, earlier ones are full
        fits = [i for i, (left, _) in enumerate(packs[-256:], max(0, len(packs) - 256)) if left >= s[k]]
        if fits:
            i = min(fits, key=lambda i: packs[i][0])
            packs[i] = (packs[i][0] - int(s[k]), [*packs[i][1], k])
        else:
            packs.append((room - int(s[k]), [k]))
    units = [(k, (k,)) for k in range(len(s)) if d[k] > 1] + [(p[0], tuple(p)) for _, p in packs]
    had, groups = np.zeros(ranks, np.int64), []
    for first, sequences in units:
        degree = int(d[first])
        ring = np.sort(np.argsort(had, kind="stable")[:degree])
        had[ring] += 1
        groups.append(Group(tuple(ring.tolist()), sequences))
    return groups
