"""What a plan takes, by a cost model: list scheduling under the rule that keeps rings from waiting in a circle.

All ranks run their micro-steps in the plan's order, and a group starts when all its members have reached it. Sums of a
rank's times would be too small: a rank that is early waits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from zoo.train.balance.cost import CostModel
from zoo.train.balance.plan import Plan, as_lengths


class Simulation(NamedTuple):
    """milliseconds: when the last rank is done. busy: (ranks,), what each worked. steps: (ranks,), how many it ran."""

    milliseconds: float
    busy: np.ndarray
    steps: np.ndarray


def simulate(plan: Plan, cost: CostModel) -> Simulation:
    """Run a plan on paper.

    Raises:
        ValueError: a group's tokens do not fit on its ranks.
    """
    lengths = np.asarray(plan.lengths)
    free, busy, steps = np.zeros(plan.ranks), np.zeros(plan.ranks), np.zeros(plan.ranks, np.int64)
    for step in plan.steps:
        if plan.lockstep:
            free[:] = free.max()
        for group in step:
            members, tokens = list(group.ranks), lengths[list(group.sequences)]
            if tokens.sum() > cost.capacity * len(members):
                raise ValueError(
                    f"simulate: {len(members)} ranks have room for {cost.capacity} tokens each; the plan gives them "
                    f"{int(tokens.sum())}"
                )
            spent = cost.step(tokens, len(members))
            free[members] = free[members].max() + spent
            busy[members] += spent
            steps[members] += 1
    return Simulation(float(free.max()), busy, steps)


def lower_bound(
    lengths: Sequence[int] | np.ndarray, cost: CostModel, ranks: int, *, degrees: Sequence[int], lockstep: bool
) -> float:
    """Milliseconds that no plan can beat whose groups have one of `degrees`.

    Every sequence at the degree that wastes least, the sum spread evenly over the ranks; or the one sequence that
    takes longest at the degree that suits it best. In lockstep every step costs b1 on the way; else each costs it on
    its own ranks.
    """
    s, d = as_lengths(lengths), np.asarray(degrees)
    times = cost.time(s[:, None], d[None])
    times = np.where(cost.least_degree(s)[:, None] <= d[None], times, np.inf)
    work, longest = float((times * d).min(axis=1).sum()) / ranks, float(times.min(axis=1).max())
    fill = float(s.sum()) / cost.capacity  # micro-steps of one rank, full to the brim
    if lockstep:
        return float(np.ceil(fill / ranks)) * cost.b1 + max(work, longest)
    return max(work + fill / ranks * cost.b1, longest + cost.b1)
