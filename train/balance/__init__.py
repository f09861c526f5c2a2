"""Sequences of uneven lengths on many ranks: plans that balance their work.

    planner = Flexible(64, CostModel(a1=..., a2=..., b1=..., capacity=..., communication=RingTraffic(...)))
    sampler = BalancedBatchSampler(lengths, planner, global_tokens=1 << 20, seed=0)
    for plan in sampler:
        for step in plan.for_rank(rank): ...  # documents' pieces, the ring of ranks, this rank's place in it

`PackedStream` is the plan of models without attention. With attention, `Flexible` divides the ranks of every step into
groups of different sizes, all ranks in step (FSDP); `Hybrid` uses any number of ranks per sequence and unequal numbers
of micro-steps (DDP). A strategy runs a plan in training. What plans cost on paper is for `benchmarks/balancing/`.
"""

from zoo.train.balance.cost import CostModel, MeasuredStep, RingTraffic, StateHandOff, refit
from zoo.train.balance.flexible import Flexible, Uniform
from zoo.train.balance.hybrid import Hybrid
from zoo.train.balance.packed_stream import PackedStream
from zoo.train.balance.plan import Group, Piece, Plan, RankStep
from zoo.train.balance.sampler import BalancedBatchSampler, Planner

__all__ = [
    "BalancedBatchSampler",
    "CostModel",
    "Flexible",
    "Group",
    "Hybrid",
    "MeasuredStep",
    "PackedStream",
    "Piece",
    "Plan",
    "Planner",
    "RankStep",
    "RingTraffic",
    "StateHandOff",
    "Uniform",
    "refit",
]
