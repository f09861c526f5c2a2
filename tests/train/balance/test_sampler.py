"""The sampler: every sequence once per epoch, one plan on every rank, and a position to resume from."""

import numpy as np
import pytest

from zoo.train.balance import (
    BalancedBatchSampler,
    CostModel,
    Flexible,
    Hybrid,
    PackedStream,
    Plan,
    Planner,
    RingTraffic,
)

COST = CostModel(a1=1e-3, a2=0.1, b1=5.0, capacity=64, communication=RingTraffic(0.03))
LENGTHS = np.random.default_rng(0).integers(1, 200, 150)
PLANNERS: list[Planner] = [Flexible(4, COST), Hybrid(4, COST), PackedStream(4, 64, chunk=8)]


def sampler(planner: Planner, seed: int = 3) -> BalancedBatchSampler:
    return BalancedBatchSampler(LENGTHS, planner, global_tokens=1500, seed=seed)


def documents(plan: Plan) -> list[int]:
    return [plan.documents[k] for step in plan.steps for group in step for k in group.sequences]


@pytest.mark.parametrize("planner", PLANNERS, ids=lambda p: type(p).__name__)
def test_every_sequence_once_per_epoch_and_the_same_plan_on_every_rank(planner: Planner) -> None:
    ranks = [sampler(planner) for _ in range(3)]
    orders = []
    for _ in range(2):  # epochs
        count = len(ranks[0])
        plans = [list(one) for one in ranks]
        assert len(plans[0]) == count
        for mine, *others in zip(*plans, strict=True):
            mine.check(COST.capacity)
            assert all(other.digest() == mine.digest() for other in others)
            assert mine.tokens <= 1500
            assert [LENGTHS[d] for d in mine.documents] == list(mine.lengths)
        seen = [d for plan in plans[0] for d in documents(plan)]
        assert sorted(seen) == list(range(len(LENGTHS)))
        orders.append([plan.documents for plan in plans[0]])
    assert orders[0] != orders[1]
    assert [p.documents for p in sampler(planner, seed=4)] != orders[0]


@pytest.mark.parametrize("planner", PLANNERS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("stop", [1, 5, "end", "beyond"])
def test_a_resumed_sampler_goes_on_where_it_was(planner: Planner, stop: int | str) -> None:
    whole, first, second = sampler(planner), sampler(planner), sampler(planner)
    want = [plan.digest() for _ in range(3) for plan in whole]
    count = {"end": len(first), "beyond": len(first) + 2}.get(str(stop), stop)
    assert isinstance(count, int)
    got: list[str] = []
    while len(got) < count:
        for plan in first:
            got.append(plan.digest())
            if len(got) == count:
                break
    second.load_state_dict(first.state_dict())
    got += [plan.digest() for _ in range(2) for plan in second]
    assert got == want[: len(got)]
    assert len(got) > count + 5


def test_steps_in_lockstep_are_shuffled() -> None:
    """Length-sorted steps would end every batch with the same kind of documents."""
    longest_first = [
        max(plan.lengths[k] for group in plan.steps[0] for k in group.sequences) == max(plan.lengths)
        for plan in sampler(Flexible(4, COST))
    ]
    assert any(longest_first)
    assert not all(longest_first)


def test_a_position_of_other_data_is_refused_and_one_of_another_planner_is_not() -> None:
    state = sampler(Flexible(4, COST)).state_dict()
    with pytest.raises(ValueError, match="belongs to other lengths, global_tokens or seed"):
        sampler(Flexible(4, COST), seed=9).load_state_dict(state)
    with pytest.raises(ValueError, match="belongs to other lengths"):
        BalancedBatchSampler(LENGTHS[::-1], Flexible(4, COST), 1500, 3).load_state_dict(state)
    sampler(Hybrid(8, COST)).load_state_dict(state)  # the same batches, planned anew


def test_a_sequence_that_fits_no_plan_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"4 ranks x 64 tokens = 256; one of 300 came"):
        BalancedBatchSampler([10, 300, 20], Flexible(4, COST), 1500)
    with pytest.raises(ValueError, match="global_tokens must be at least 1; got 0"):
        BalancedBatchSampler([10], Flexible(4, COST), 0)


def test_a_long_sequence_makes_a_batch_alone() -> None:
    sizes = [len(plan.documents) for plan in BalancedBatchSampler([250, 9, 9, 9, 9], Flexible(4, COST), 100)]
    assert 1 in sizes
    assert sum(sizes) == 5
