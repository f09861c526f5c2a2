"""Plans of several steps in lockstep: every rank runs the same number of them, as gathered weights (FSDP) want it.

A batch is sorted by length and cut into micro-batches of like token sums (FlexSP's sequence blaster), each of which is
one step. Fewer steps pay the fixed cost less often, more steps put like lengths together.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from zoo.train.balance.assignment import Assignment, best_assignment, powers_of_two, uniform_assignment
from zoo.train.balance.cost import CostModel
from zoo.train.balance.micro_batches import consecutive_parts
from zoo.train.balance.plan import Group, Plan, as_lengths, refuse_too_long


@dataclass(frozen=True)
class Flexible:
    """Groups of different sizes side by side, powers of two, each at a multiple of its size.

    Args:
        ranks: how many.
        cost: what micro-steps cost.
        tries: numbers of steps tried above the least that has room for the tokens.
        chunk: cuts inside a group are multiples of it.
    """

    ranks: int
    cost: CostModel
    tries: int = 2
    chunk: int = 1

    def __call__(self, lengths: Sequence[int] | np.ndarray) -> Plan:
        """A plan for a batch.

        Raises:
            ValueError: a sequence does not fit on all ranks together.
        """
        s, cost = as_lengths(lengths), self.cost.in_chunks(self.chunk)
        refuse_too_long(s, cost.capacity, 1 << self.ranks.bit_length() - 1)
        mixed = _best(s, self, cost, functools.partial(best_assignment, ranks=self.ranks, cost=cost))
        # Groups of one size are also searched by themselves, so that no plan of that kind is ever better.
        return min(mixed, Uniform(self.ranks, self.cost, None, self.tries, self.chunk).search(s), key=_milliseconds)[1]


@dataclass(frozen=True)
class Uniform:
    """Groups of one size: static context parallelism, or the best size of each batch.

    Args:
        ranks, cost, tries, chunk: as for Flexible.
        degree: ranks of a group; None for the best power of two of every batch.
    """

    ranks: int
    cost: CostModel
    degree: int | None = None
    tries: int = 2
    chunk: int = 1

    def __post_init__(self) -> None:
        if self.degree is not None and self.degree not in powers_of_two(self.ranks):
            raise ValueError(
                f"Uniform: the degree must be a power of two of at most {self.ranks} ranks; got {self.degree}"
            )

    def __call__(self, lengths: Sequence[int] | np.ndarray) -> Plan:
        """A plan for a batch.

        Raises:
            ValueError: a sequence does not fit on one group.
        """
        return self.search(as_lengths(lengths))[1]

    def search(self, s: np.ndarray) -> tuple[float, Plan]:
        """The least time in milliseconds, and the plan that takes it."""
        cost = self.cost.in_chunks(self.chunk)
        degrees = powers_of_two(self.ranks) if self.degree is None else (self.degree,)
        refuse_too_long(s, cost.capacity, degrees[-1])
        plans = [
            _best(s, self, cost, functools.partial(uniform_assignment, ranks=self.ranks, degree=d, cost=cost))
            for d in degrees
            if s.max() <= d * cost.capacity
        ]
        return min(plans, key=_milliseconds)


def _milliseconds(timed: tuple[float, Plan]) -> float:
    return timed[0]


def _best(
    s: np.ndarray, planner: Flexible | Uniform, cost: CostModel, solve: Callable[[np.ndarray], Assignment]
) -> tuple[float, Plan]:
    """Milliseconds and plan with the best number of steps."""
    order = np.argsort(-s, kind="stable")
    tokens = s[order]
    first = -(-int(s.sum()) // (planner.ranks * cost.capacity))
    best, solution = np.inf, None
    for steps in itertools.count(first):
        if steps > len(s) or (solution is not None and steps > first + planner.tries):
            break
        cuts = consecutive_parts(tokens, steps)
        total, solved = (len(cuts) - 1) * cost.b1, []
        for i, j in itertools.pairwise(cuts):
            if total < best:
                solved.append(solve(tokens[i:j]))
                total += solved[-1].milliseconds
        if total < best:
            best, solution = total, list(zip(cuts, solved, strict=False))
    if solution is None:
        raise AssertionError("one sequence a step always fits")
    return best, Plan(
        tuple(s.tolist()),
        planner.ranks,
        tuple(_groups(a, order[i:]) for i, a in solution),
        chunk=planner.chunk,
        lockstep=True,
    )


def _groups(assignment: Assignment, order: np.ndarray) -> tuple[Group, ...]:
    """Ranks in turn, the largest groups first, so that each begins at a multiple of its size."""
    ends = itertools.accumulate(assignment.degrees)
    return tuple(
        Group(tuple(range(end - degree, end)), tuple(int(order[k]) for k in sequences))
        for end, degree, sequences in zip(ends, assignment.degrees, assignment.sequences, strict=True)
        if sequences
    )
