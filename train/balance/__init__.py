"""Sequences of uneven lengths on many ranks: plans that balance their work, and what the plans cost.

    planner = Flexible(64, PUBLISHED["7b"].cost())
    sampler = BalancedBatchSampler(lengths, planner, global_tokens=1 << 20, seed=0)
    for plan in sampler:
        simulate(plan, cost).milliseconds
        for step in plan.for_rank(rank): ...  # documents' pieces, the ring of ranks, this rank's place in it

`PackedStream` is the plan of models without attention. With attention, `Flexible` divides the ranks of every step into
groups of different sizes, all ranks in step (FSDP); `Hybrid` uses any number of ranks per sequence and unequal numbers
of micro-steps (DDP). `execute` runs a plan in plain torch; a strategy runs it in training.
"""

from zoo.train.balance.cost import PUBLISHED, AllToAll, CostModel, Measured, Ring, StateHandOff, refit
from zoo.train.balance.flexible import Flexible, Uniform
from zoo.train.balance.hybrid import Hybrid
from zoo.train.balance.packed_stream import PackedStream
from zoo.train.balance.plan import Group, Piece, Plan, RankStep
from zoo.train.balance.sampler import BalancedBatchSampler, Planner
from zoo.train.balance.simulate import Simulation, lower_bound, simulate

__all__ = [
    "PUBLISHED",
    "AllToAll",
    "BalancedBatchSampler",
    "CostModel",
    "Flexible",
    "Group",
    "Hybrid",
    "Measured",
    "PackedStream",
    "Piece",
    "Plan",
    "Planner",
    "RankStep",
    "Ring",
    "Simulation",
    "StateHandOff",
    "Uniform",
    "lower_bound",
    "refit",
    "simulate",
]
