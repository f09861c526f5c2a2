"""The greedy plan of a step against the integer programme."""

import numpy as np
import pytest
from balancing.lengths import CORPORA
from balancing.published import PUBLISHED
from balancing.simulate import lower_bound
from exact_plans import best_step

from zoo.train.balance import CostModel, RingTraffic, StateHandOff
from zoo.train.balance.assignment import best_assignment, powers_of_two

SEVEN = PUBLISHED["7b"].cost()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "cost",
    [SEVEN, CostModel(a1=5e-6, a2=0.2, b1=1.0, capacity=6000, communication=RingTraffic(0.03))],
    ids=["all-to-all", "ring"],
)
def test_the_greedy_step_is_within_five_percent_of_the_optimum(seed: int, cost: CostModel) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 9))
    tokens = np.sort(CORPORA["magi"].sample(n, rng, 8 * 4000))[::-1]
    ours = best_assignment(tokens, 8, cost)
    exact = best_step(tokens, 8, cost)
    assert exact.bound <= exact.milliseconds * (1 + 1e-4)
    assert exact.milliseconds <= ours.milliseconds * (1 + 1e-6) <= 1.05 * exact.milliseconds
    bound = lower_bound(tokens, cost, 8, degrees=powers_of_two(8), lockstep=True)
    assert exact.milliseconds >= bound - cost.b1 * np.ceil(tokens.sum() / cost.capacity / 8) - 1e-3


def test_a_fixed_cost_of_groups_is_seen() -> None:
    """Two sequences that would each take two ranks stay apart where talking costs more than it saves."""
    dear = CostModel(a1=0.0, a2=1.0, b1=0.0, capacity=100, communication=StateHandOff(1000.0))
    assert best_step(np.array([90, 80]), 4, dear).milliseconds == pytest.approx(90.0)
    assert best_assignment(np.array([90, 80]), 4, dear).milliseconds == pytest.approx(90.0)
    with pytest.raises(ValueError, match="no plan for 1 sequences on 4 ranks"):
        best_step(np.array([401]), 4, dear)
