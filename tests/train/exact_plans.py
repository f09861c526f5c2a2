"""The integer programme of one step, solved exactly by scipy: the oracle of zoo.train.balance.assignment.

For small instances: sequences times groups are its integers.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

from zoo.train.balance.assignment import powers_of_two
from zoo.train.balance.cost import CostModel


class Optimum(NamedTuple):
    """milliseconds: of the slowest group in the best solution found, without b1. bound: below which none is."""

    milliseconds: float
    bound: float


def best_step(tokens: np.ndarray, ranks: int, cost: CostModel, *, seconds: float = 60.0) -> Optimum:
    """min C over virtual groups: for every power of two d there are ranks // d that may be used.

    With A_kp = 1 where sequence k goes to group p and m_p = 1 where the group is used:
        sum_k A_kp t(s_k, d_p) + fixed m_p <= C,   sum_k A_kp s_k <= d_p capacity m_p,   sum_p d_p m_p <= ranks,
        sum_p A_kp = 1,   m_p >= m_{p+1} among groups of one size.

    Raises:
        ValueError: nothing was found in the time, or there is nothing.
    """
    degrees = np.concatenate([np.full(ranks // d, d) for d in powers_of_two(ranks)])
    n, groups = len(tokens), len(degrees)
    times = cost.time(tokens[:, None], degrees[None])
    used, last = n * groups, n * groups + groups  # columns: A row by row, m, C
    rows: list[tuple[dict[int, float], float, float]] = []
    for p, d in enumerate(degrees):
        load = {k * groups + p: float(times[k, p]) for k in range(n)}
        rows.append(({**load, used + p: cost.communication.fixed(int(d)), last: -1.0}, -np.inf, 0.0))
        room = {k * groups + p: float(tokens[k]) for k in range(n)}
        rows.append(({**room, used + p: -float(d * cost.capacity)}, -np.inf, 0.0))
        if p + 1 < groups and degrees[p + 1] == d:
            rows.append(({used + p: 1.0, used + p + 1: -1.0}, 0.0, np.inf))
    rows.append(({used + p: float(d) for p, d in enumerate(degrees)}, -np.inf, float(ranks)))
    rows += [({k * groups + p: 1.0 for p in range(groups)}, 1.0, 1.0) for k in range(n)]
    matrix = lil_array((len(rows), last + 1))
    for i, (row, _, _) in enumerate(rows):
        for j, value in row.items():
            matrix[i, j] = value
    upper = np.ones(last + 1)
    upper[last] = np.inf
    objective = np.zeros(last + 1)
    objective[last] = 1.0
    found = milp(
        objective,
        constraints=LinearConstraint(matrix.tocsc(), [low for _, low, _ in rows], [high for _, _, high in rows]),
        integrality=np.concatenate([np.ones(last), [0]]),
        bounds=Bounds(np.zeros(last + 1), upper),
        options={"time_limit": seconds},
    )
    if found.x is None:
        raise ValueError(f"best_step: no plan for {n} sequences on {ranks} ranks: {found.message}; allow more seconds")
    return Optimum(float(found.fun), float(found.mip_dual_bound))
